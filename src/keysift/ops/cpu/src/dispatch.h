// One table of function pointers a family of kernels and instruction set, chosen at run time.
//
// A family declares its table in a header that both sides include,
//
//     struct GatherKernels { void (*share)(const GatherTask&); };
//     KS_DECLARE_TABLES(GatherKernels, gather)
//
// its *_kernels.cpp, which is compiled once an instruction set, defines it,
//
//     KS_DEFINE_TABLE(GatherKernels, gather) = {KS_ISA::share};
//
// and the file that is compiled once calls KS_TABLE(gather, isa).share(task).
#pragma once

#include "abi.h"

#define KS_JOIN2(a, b) a##b
#define KS_JOIN(a, b) KS_JOIN2(a, b)

#define KS_DECLARE_TABLES(Type, family) \
  extern const Type family##_portable, family##_avx2, family##_avx512, family##_avx512_bf16, family##_neon;
#define KS_DEFINE_TABLE(Type, family) extern const Type KS_JOIN(family##_, KS_ISA)
#define KS_TABLE(family, isa)                                                                              \
  (*ks::pick(isa, &family##_portable, KS_IF_AVX2(family), KS_IF_AVX512(family), KS_IF_AVX512_BF16(family), \
             KS_IF_NEON(family)))

#ifdef KS_HAVE_AVX2
#define KS_IF_AVX2(family) &family##_avx2
#else
#define KS_IF_AVX2(family) nullptr
#endif
#ifdef KS_HAVE_AVX512
#define KS_IF_AVX512(family) &family##_avx512
#else
#define KS_IF_AVX512(family) nullptr
#endif
#ifdef KS_HAVE_AVX512_BF16
#define KS_IF_AVX512_BF16(family) &family##_avx512_bf16
#else
#define KS_IF_AVX512_BF16(family) nullptr
#endif
#ifdef KS_HAVE_NEON
#define KS_IF_NEON(family) &family##_neon
#else
#define KS_IF_NEON(family) nullptr
#endif

namespace ks {

// The table of an Isa that resolve() returned: it was compiled.
template <class Table, class A, class B, class C, class D>
const Table* pick(Isa isa, const Table* portable, A avx2, B avx512, C avx512_bf16, D neon) {
  const Table* of[] = {nullptr, portable, avx2, avx512, avx512_bf16, neon};
  return of[isa];
}

}  // namespace ks
