// What the selection kernels need beyond simd.h: integers, 2 ** x, whole rows as floats. Only for *_kernels.cpp.
#pragma once

#include "abi.h"
#include "codes_view.h"
#include "simd.h"

namespace ks {
namespace KS_ISA {

KS_INLINE i32v set1_int(int32_t x) { return i32v{} + x; }
KS_INLINE i32v load_int(const int32_t* p) {
  i32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KS_INLINE void store_int(int32_t* p, i32v v) { std::memcpy(p, &v, sizeof v); }
KS_INLINE f32v least_of(f32v a, f32v b) { return a < b ? a : b; }  // the second where one is no number
KS_INLINE f32v most_of(f32v a, f32v b) { return a > b ? a : b; }

// Towards zero; what an int32 does not hold becomes anything.
KS_INLINE i32v cut(f32v x) {
#if KS_WIDTH == 16
  return (i32v)_mm512_cvttps_epi32(x);
#elif KS_WIDTH == 8
  return (i32v)_mm256_cvttps_epi32(x);
#elif defined(__x86_64__)
  return (i32v)_mm_cvttps_epi32(x);
#elif defined(__aarch64__)
  return (i32v)vcvtq_s32_f32(x);
#else
  return __builtin_convertvector(x, i32v);
#endif
}

// Rounded down, of what an int32 holds.
KS_INLINE f32v floor_of(f32v x) {
#if KS_WIDTH == 16
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif KS_WIDTH == 8
  return _mm256_floor_ps(x);
#else
  const f32v whole = to_floats(cut(x));
  return whole > x ? whole - set1(1.0f) : whole;
#endif
}

// Bit i is set where lane i is below 0.
KS_INLINE uint32_t signs(i32v v) {
#if KS_WIDTH == 16
  return _mm512_movepi32_mask((__m512i)v);
#elif KS_WIDTH == 8
  return uint32_t(_mm256_movemask_ps((__m256)v));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps((__m128)v));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; i++) bits |= uint32_t(v[i] < 0) << i;
  return bits;
#endif
}

// 2 ** x with a relative error below 3e-7 for x from -126 to 127, and what those give beyond.
KS_INLINE f32v exp2_of(f32v x) {
  x = least_of(most_of(x, set1(-126.0f)), set1(127.0f));
  const f32v magic = set1(12582912.0f);  // to add 1.5 * 2 ** 23 rounds to an integer
  const f32v shifted = x + magic;
  const f32v f = x - (shifted - magic);  // from -1/2 to 1/2
  f32v y = set1(1.5353362e-4f);
  y = fma(y, f, set1(1.3398874e-3f));
  y = fma(y, f, set1(9.6184373e-3f));
  y = fma(y, f, set1(5.5503324e-2f));
  y = fma(y, f, set1(2.4022648e-1f));
  y = fma(y, f, set1(6.9314720e-1f));
  y = fma(y, f, set1(1.0f));
  return (f32v)((i32v)y + ((i32v)shifted << 23));
}

// `n` numbers as floats.
KS_INLINE void widen(const void* from, int32_t dtype, int64_t n, float* to) {
  if (dtype == FP32) {
    std::memcpy(to, from, size_t(n) * 4);
  } else if (dtype == BF16) {
    const bf16_t* x = static_cast<const bf16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = to_float(x[i]);
  } else {
    const fp16_t* x = static_cast<const fp16_t*>(from);
    int64_t i = 0;
#if defined(__F16C__)
    for (const int64_t whole = n & ~int64_t(7); i < whole; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
    }
#endif
    for (; i < n; i++) to[i] = to_float(x[i]);
  }
}

// Sum of products of `n` numbers, a multiple of W.
KS_INLINE float dot(const float* a, const float* b, int64_t n) {
  f32v s = zero(), t = zero();
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s = fma(load(a + i), load(b + i), s);
    t = fma(load(a + i + W), load(b + i + W), t);
  }
  if (i < n) s = fma(load(a + i), load(b + i), s);
  return sum(s + t);
}

// The key at `at` elements from the start of the keys, as floats.
template <class Args>
KS_INLINE void key_of(const Args& a, int64_t at, float* to) {
  widen(static_cast<const char*>(a.k) + at * bytes_of(a.k_dtype), a.k_dtype, a.dim, to);
}

}  // namespace KS_ISA
}  // namespace ks
