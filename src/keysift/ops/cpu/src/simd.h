// The vector layer: what kernels are written in. Compiled once an instruction set, in a namespace of its own.
//
// Files that include this are named *_kernels.cpp. Everything in them is in namespace ks::KS_ISA and static or inline
// here, and they use no templates of the standard library: of two copies of one inline function the linker keeps one,
// and that one might hold instructions that the CPU lacks.
//
// f32v is a vector of W floats; + - * / and comparisons with GCC's vector syntax work on it.
// Rows of keys are read two vectors at a time in "pair order": for bf16 the even elements and the odd ones, which a
// shift and a mask give; for other types the first W and the next W. What is multiplied with them is packed alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KS_INLINE static inline __attribute__((always_inline))

namespace ks {
namespace KS_ISA {

struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

#if defined(KS_ISA_AVX512) || defined(KS_ISA_AVX512_BF16)
#define KS_WIDTH 16
#elif defined(KS_ISA_AVX2)
#define KS_WIDTH 8
#else
#define KS_WIDTH 4
#endif

constexpr int W = KS_WIDTH;
typedef float f32v __attribute__((vector_size(4 * KS_WIDTH)));
typedef int32_t i32v __attribute__((vector_size(4 * KS_WIDTH)));
typedef uint32_t u32v __attribute__((vector_size(4 * KS_WIDTH)));

// ---- scalars

KS_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
KS_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
KS_INLINE float to_float(float x) { return x; }
KS_INLINE float to_float(bf16_t x) { return bits_to_float(uint32_t(x.bits) << 16); }
KS_INLINE float to_float(fp16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 h;
  std::memcpy(&h, &x.bits, 2);
  return h;
#else
  // exponent and fraction move into place; what is subnormal or beyond is set right by a multiplication
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = bits_to_float(magnitude) * bits_to_float(0x77800000);    // 2^112
  if (value >= 65536.0f) value = bits_to_float(magnitude | 0x7f800000);  // infinity and NaN
  return bits_to_float(float_to_bits(value) | uint32_t(x.bits & 0x8000) << 16);
#endif
}
// Rounds to the nearest, ties to even; a NaN stays one.
KS_INLINE void from_float(float x, float* to) { *to = x; }
KS_INLINE void from_float(float x, bf16_t* to) {
  const uint32_t bits = float_to_bits(x);
  to->bits = uint16_t(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
KS_INLINE void from_float(float x, fp16_t* to) {
#if defined(__F16C__)
  to->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 h = __fp16(x);
  std::memcpy(&to->bits, &h, 2);
#else
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000, magnitude = float_to_bits(x) & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 65536 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the fraction in the lowest bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = uint16_t(sign | half);
#endif
}
KS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
KS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
KS_INLINE int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ---- vectors of floats

KS_INLINE f32v zero() { return f32v{}; }
KS_INLINE f32v set1(float x) {
#if KS_WIDTH == 16
  return _mm512_set1_ps(x);
#elif KS_WIDTH == 8
  return _mm256_set1_ps(x);
#else
  return f32v{x, x, x, x};
#endif
}
KS_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KS_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

// Keeps the compiler from reading a vector again from memory for each use.
template <class V>
KS_INLINE void hold(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

KS_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if KS_WIDTH == 16
  return _mm512_fmadd_ps(a, b, c);
#elif KS_WIDTH == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
KS_INLINE f32v highest(f32v a, f32v b) {
#if KS_WIDTH == 16
  return _mm512_max_ps(a, b);
#elif KS_WIDTH == 8
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#elif defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}
KS_INLINE f32v lowest(f32v a, f32v b) { return -highest(-a, -b); }
KS_INLINE f32v root(f32v x) {
#if KS_WIDTH == 16
  return _mm512_sqrt_ps(x);
#elif KS_WIDTH == 8
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  f32v y;
  for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}
// Rounded to the nearest integer.
KS_INLINE i32v to_int(f32v x) {
#if KS_WIDTH == 16
  return (i32v)_mm512_cvtps_epi32(x);
#elif KS_WIDTH == 8
  return (i32v)_mm256_cvtps_epi32(x);
#elif defined(__x86_64__)
  return (i32v)_mm_cvtps_epi32(x);
#elif defined(__aarch64__)
  return (i32v)vcvtnq_s32_f32(x);
#else
  return __builtin_convertvector(x + (x < 0 ? set1(-0.5f) : set1(0.5f)), i32v);
#endif
}
KS_INLINE f32v to_floats(i32v x) { return __builtin_convertvector(x, f32v); }
// base[at[i]]
KS_INLINE f32v gather(const float* base, i32v at) {
#if KS_WIDTH == 16
  return _mm512_i32gather_ps((__m512i)at, base, 4);
#elif KS_WIDTH == 8
  return _mm256_i32gather_ps(base, (__m256i)at, 4);
#else
  f32v v;
  for (int i = 0; i < W; i++) v[i] = base[at[i]];
  return v;
#endif
}

// Of the first half of the lanes and the second, and so on.
KS_INLINE float sum(f32v v) {
#if KS_WIDTH == 4
  return (v[0] + v[2]) + (v[1] + v[3]);
#else
#if KS_WIDTH == 16
  const __m256 eight = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
#else
  const __m256 eight = v;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}
KS_INLINE float largest(f32v v) {
  float x[W];
  store(x, v);
  for (int i = 1; i < W; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}

typedef float f32x4 __attribute__((vector_size(16)));

// Sums of four vectors.
KS_INLINE f32x4 sums(f32v a, f32v b, f32v c, f32v d) {
#if KS_WIDTH == 16
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 each = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(each) + _mm512_extractf32x8_ps(each, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif KS_WIDTH == 8
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256 each = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  return _mm256_castps256_ps128(each) + _mm256_extractf128_ps(each, 1);
#elif defined(__x86_64__)
  const __m128 ab = _mm_unpacklo_ps(a, b) + _mm_unpackhi_ps(a, b);
  const __m128 cd = _mm_unpacklo_ps(c, d) + _mm_unpackhi_ps(c, d);
  return _mm_movelh_ps(ab, cd) + _mm_movehl_ps(cd, ab);
#elif defined(__aarch64__)
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
#else
  return f32x4{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// e^x for x <= 88, with a relative error below 2e-7; 0 for x < -87, also for -inf; NaN for NaN.
KS_INLINE f32v exp(f32v x) {
  const f32v kept = highest(set1(-87.0f), x);  // in this order a NaN stays one
  const i32v n = to_int(kept * set1(1.44269504f));
  const f32v whole = to_floats(n);
  f32v r = fma(whole, set1(-0.693145752f), kept);  // ln 2 in two parts
  r = fma(whole, set1(-1.42860677e-6f), r);
  f32v y = set1(1.9875691500e-4f);
  y = fma(y, r, set1(1.3981999507e-3f));
  y = fma(y, r, set1(8.3334519073e-3f));
  y = fma(y, r, set1(4.1665795894e-2f));
  y = fma(y, r, set1(1.6666665459e-1f));
  y = fma(y, r, set1(5.0000001201e-1f));
  y = fma(y, r * r, r + set1(1.0f));
  const f32v result = (f32v)((i32v)y + (n << 23));
  return (f32v)((i32v)result & ~(x < set1(-87.0f)));
}

// ---- rows of keys and values: 2 W elements in pair order

struct pair {
  f32v first, second;
};

KS_INLINE pair load2(const float* p) { return {load(p), load(p + W)}; }
KS_INLINE pair load2(const bf16_t* p) {
  u32v both;
  std::memcpy(&both, p, sizeof both);
  return {(f32v)(both << 16), (f32v)(both & 0xffff0000u)};
}
KS_INLINE pair load2(const fp16_t* p) {
#if KS_WIDTH == 16
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
          _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + W)))};
#elif KS_WIDTH == 8
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + W)))};
#elif defined(__aarch64__)
  float16x8_t h;
  std::memcpy(&h, p, sizeof h);
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
#else
  pair x;
  for (int i = 0; i < W; i++) {
    x.first[i] = to_float(p[i]);
    x.second[i] = to_float(p[W + i]);
  }
  return x;
#endif
}
// One of the two vectors alone; a row that is in the cache is read twice where registers are scarce.
template <class T>
KS_INLINE f32v load_half(const T* p, int half) {
  return half ? load2(p).second : load2(p).first;
}

// n < 2 W elements; the others are 0.
template <class T>
KS_INLINE pair load2_part(const T* p, int64_t n) {
#if KS_WIDTH == 16
  const __mmask32 in_use = (__mmask32(1) << n) - 1;
  if (sizeof(T) == 4) return {_mm512_maskz_loadu_ps(__mmask16(in_use), p), _mm512_maskz_loadu_ps(in_use >> W, p + W)};
  const __m512i loaded = _mm512_maskz_loadu_epi16(in_use, p);
#else
  u32v loaded[2] = {};
  if (n == W) {
    std::memcpy(loaded, p, W * sizeof(T));
  } else {
    std::memcpy(loaded, p, size_t(n) * sizeof(T));
  }
#endif
  T padded[2 * W];
  std::memcpy(padded, &loaded, sizeof padded);
  return load2(padded);
}

// Where element i of a row stands in pair order.
template <class T>
KS_INLINE int64_t paired(int64_t i, const T*) {
  return i;
}
KS_INLINE int64_t paired(int64_t i, const bf16_t*) { return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2; }

// Back from pair order.
template <class T>
KS_INLINE void store2(float* to, f32v first, f32v second, const T*) {
  store(to, first);
  store(to + W, second);
}
KS_INLINE void store2(float* to, f32v first, f32v second, const bf16_t*) {
  for (int i = 0; i < W; i++) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second[i];
  }
}

// Into the second cache, which has room for more that is on its way than the first.
KS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace KS_ISA
}  // namespace ks
