// Products of codes with a query's integers. Only for *_kernels.cpp.
//
// Fields of a code are masked out of its bytes where they are, those of the upper nibble after a shift, and multiplied
// as unsigned bytes with the query's integers: the codes of a token are read once for four heads of a group.
#pragma once

#include "codes_vec.h"
#include "key_codes.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int TOGETHER = 4;  // heads, or tokens of one head, whose products are added up as one vector

// The queries of a KV head, ready to be multiplied.
struct Query {
  int64_t group, planes, bytes;
  bool fast;
  int8_t* vectors;   // fast: [heads up to a multiple of 4, fields, vectors of 32 bytes]; else [group, code_dim]
  int64_t* missing;  // [group]: what unsigned levels of the last field add to a sum
  float *slope, *shift, *log_c;
};

KS_INLINE int64_t query_bytes(const ks_key_sample_args& a) {
  const int64_t group = a.heads / a.kv_heads;
  return ceil_to((group + 3) * 8 * most(32, a.code_dim), 64) + ceil_to(group * 32, 64);
}

KS_INLINE int64_t per_vector(int64_t bytes) { return bytes < 32 ? 32 / bytes : 1; }

KS_INLINE Query query_of(const ks_key_sample_args& a, int64_t b, int64_t head, char* buffer) {
  Query q;
  q.group = a.heads / a.kv_heads, q.planes = a.planes, q.bytes = bytes_of_code(a);
  const int64_t fields = 8 / a.planes, h = b * a.heads + head * q.group;
  q.missing = reinterpret_cast<int64_t*>(buffer);
  q.slope = reinterpret_cast<float*>(q.missing + q.group);
  q.shift = q.slope + q.group;
  q.log_c = q.shift + q.group;
  q.vectors = reinterpret_cast<int8_t*>(buffer + ceil_to(q.group * 32, 64));
#if defined(__AVX2__)
  q.fast = a.planes < 8 && (q.bytes == 16 || q.bytes % 32 == 0);
#else
  q.fast = false;
#endif
  const int64_t width = most(32, q.bytes), padded = q.fast && q.group > 1 ? ceil_to(q.group, TOGETHER) : q.group;
  for (int64_t g = 0; g < padded; g++) {
    const int8_t* from = a.weights + (h + (g < q.group ? g : 0)) * a.code_dim;
    int64_t last = 0;
    for (int64_t c = 0; c < a.code_dim; c++) {
      const int64_t f = c / q.bytes, j = c % q.bytes, many = int64_t(1) << (f * a.planes % 4);
      if (f == fields - 1) last += from[c] * many;
      if (!q.fast) {  // levels are multiplied as they are, so that they need the integer itself
        reinterpret_cast<int16_t*>(q.vectors)[g * a.code_dim + c] = int16_t(from[c] * many);
        continue;
      }
      for (int64_t r = 0; r < per_vector(q.bytes); r++) q.vectors[(g * fields + f) * width + r * q.bytes + j] = from[c];
    }
    if (g >= q.group) break;
    q.missing[g] = last * (int64_t(1) << (a.planes - 1));
    q.slope[g] = a.line[2 * (h + g)], q.shift[g] = a.line[2 * (h + g) + 1];
    q.log_c[g] = a.log_c ? a.log_c[h + g] : 0;
  }
  return q;
}

// Products with codes of levels as unsigned numbers, one token and head after the other.
void plain_products(const Query& q, const uint8_t* codes, int64_t n, int32_t* to) {
  const int64_t fields = 8 / q.planes, dim = q.bytes * fields;
  const int32_t mask = (1 << q.planes) - 1;
  const int16_t* weights = reinterpret_cast<const int16_t*>(q.vectors);
  int16_t level[4096];
  for (int64_t i = 0; i < n; i++, codes += q.bytes) {
    for (int64_t f = 0; f < fields; f++) {
      for (int64_t j = 0; j < q.bytes; j++) {
        level[f * q.bytes + j] = int16_t(((codes[j] ^ 0x80) >> (f * q.planes)) & mask);
      }
    }
    for (int64_t g = 0; g < q.group; g++) {
      const int16_t* w = weights + g * dim;
      int32_t sum = 0;
      for (int64_t c = 0; c < dim; c++) sum += int32_t(level[c]) * int32_t(w[c]);
      to[g * BLOCK + i] = sum;
    }
  }
}

#if defined(__AVX2__)
// Keeps the compiler from adding up in another order, for which it would need more registers than there are.
#define KS_KEEP(vector) __asm__("" : "+x"(vector))

// 32 bytes of codes as fields of unsigned bytes.
template <int FIELDS>
KS_INLINE void fields_of(__m256i code, __m256i* field) {
  constexpr int PLANES = 8 / FIELDS;
  const __m256i low = _mm256_xor_si256(code, _mm256_set1_epi8(int8_t(0x80))), high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 8
  for (int f = 0; f < FIELDS; f++) {
    const __m256i mask = _mm256_set1_epi8(int8_t(((1 << PLANES) - 1) << (f * PLANES % 4)));
    field[f] = _mm256_and_si256(f * PLANES < 4 ? low : high, mask);
  }
}

// Sums over pairs of bytes, in 16 bits, or over four, in 32 bits, where 16 would not hold what follows.
template <int FIELDS, bool WIDE>
KS_INLINE __m256i product(const __m256i* field, const int8_t* weights, int64_t width, __m256i sum) {
#if defined(__AVX512VNNI__)
  if (WIDE) {
#pragma GCC unroll 8
    for (int f = 0; f < FIELDS; f++) {
      sum = _mm256_dpbusd_epi32(sum, field[f], _mm256_loadu_si256((const __m256i*)(weights + f * width)));
    }
    return sum;
  }
#endif
  __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int f = 0; f < FIELDS; f++) {
    const __m256i w = _mm256_loadu_si256((const __m256i*)(weights + f * width));
    pairs = f ? _mm256_add_epi16(pairs, _mm256_maddubs_epi16(field[f], w)) : _mm256_maddubs_epi16(field[f], w);
    KS_KEEP(pairs);
  }
  if (WIDE) return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  return _mm256_add_epi16(sum, pairs);
}

// Sums of four vectors, each half of the vector for itself: [sums of the lower halves, sums of the upper halves].
template <bool WIDE>
KS_INLINE __m256i four_sums(const __m256i* v) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i low = WIDE ? _mm256_add_epi32(a, b) : _mm256_add_epi16(a, b);
  const __m256i high = WIDE ? _mm256_add_epi32(c, d) : _mm256_add_epi16(c, d);
  const __m256i one = _mm256_unpacklo_epi64(low, high), two = _mm256_unpackhi_epi64(low, high);
  if (WIDE) return _mm256_add_epi32(one, two);
  return _mm256_madd_epi16(_mm256_add_epi16(one, two), _mm256_set1_epi16(1));
}

// Four heads of tokens whose codes fill a vector or more, one token after the other.
template <int FIELDS, bool WIDE, bool ONE_VECTOR>
KS_INLINE __m128i token_of_four(const uint8_t* code, const int8_t* weights, int64_t bytes) {
  if (ONE_VECTOR) bytes = 32;
  __asm__ volatile("" : "+r"(weights));  // read for each token: kept for the next one, they would fill the stack
  __m256i sum[4] = {};
  for (int64_t j = 0; j < bytes; j += 32) {
    __m256i field[FIELDS];
    fields_of<FIELDS>(_mm256_loadu_si256((const __m256i*)(code + j)), field);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) sum[g] = product<FIELDS, WIDE>(field, weights + g * FIELDS * bytes + j, bytes, sum[g]);
  }
  const __m256i halves = four_sums<WIDE>(sum);
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// Columns of four rows of four.
KS_INLINE void transpose(__m128i* x) {
  __m128 a = _mm_castsi128_ps(x[0]), b = _mm_castsi128_ps(x[1]), c = _mm_castsi128_ps(x[2]), d = _mm_castsi128_ps(x[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  x[0] = _mm_castps_si128(a), x[1] = _mm_castps_si128(b), x[2] = _mm_castps_si128(c), x[3] = _mm_castps_si128(d);
}

// Four tokens for four heads; `to` has room for four tokens of each.
template <int FIELDS, bool WIDE>
KS_INLINE void four_of_four(const uint8_t* codes, const int8_t* weights, int64_t bytes, int32_t* to) {
  __m128i token[4];
  if (bytes == 32) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) token[i] = token_of_four<FIELDS, WIDE, true>(codes + i * 32, weights, 32);
  } else if (bytes > 32) {
    for (int i = 0; i < 4; i++) token[i] = token_of_four<FIELDS, WIDE, false>(codes + i * bytes, weights, bytes);
  } else {  // two tokens a vector
    for (int i = 0; i < 4; i += 2) {
      __m256i field[FIELDS], sum[4];
      fields_of<FIELDS>(_mm256_loadu_si256((const __m256i*)(codes + i * bytes)), field);
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        sum[g] = product<FIELDS, WIDE>(field, weights + g * FIELDS * 32, 32, _mm256_setzero_si256());
      }
      const __m256i halves = four_sums<WIDE>(sum);
      token[i] = _mm256_castsi256_si128(halves);
      token[i + 1] = _mm256_extracti128_si256(halves, 1);
    }
  }
  transpose(token);
  for (int g = 0; g < 4; g++) _mm_storeu_si128((__m128i*)(to + g * BLOCK), token[g]);
}

// Four tokens, or eight of half a vector, for one head.
template <int FIELDS, bool WIDE>
KS_INLINE void some_of_one(const uint8_t* codes, const int8_t* weights, int64_t bytes, int32_t* to) {
  const int64_t step = bytes < 32 ? 32 : bytes;
  __m256i sum[4] = {};
  for (int i = 0; i < 4; i++) {
    for (int64_t j = 0; j < step; j += 32) {
      __m256i field[FIELDS];
      fields_of<FIELDS>(_mm256_loadu_si256((const __m256i*)(codes + i * step + j)), field);
      sum[i] = product<FIELDS, WIDE>(field, weights + j, step, sum[i]);
    }
  }
  const __m256i halves = four_sums<WIDE>(sum);
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  if (bytes >= 32) {
    _mm_storeu_si128((__m128i*)to, _mm_add_epi32(low, high));
  } else {  // the lower halves are the even tokens
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(low, high));
    _mm_storeu_si128((__m128i*)(to + 4), _mm_unpackhi_epi32(low, high));
  }
}

template <int FIELDS, bool WIDE>
void fast_products(const Query& q, const uint8_t* codes, int64_t n, int32_t* to) {
  const int64_t bytes = q.bytes, width = bytes < 32 ? 32 : bytes, step = q.group > 1 || bytes >= 32 ? 4 : 8;
  uint8_t rest[8 * 512];
  for (int64_t i = 0; i < n; i += step) {
    const uint8_t* from = codes + i * bytes;
    if (i + step > n) {  // nothing is read past the last code; what is written has room
      std::memcpy(rest, from, size_t((n - i) * bytes));
      from = rest;
    }
    if (q.group == 1) {
      some_of_one<FIELDS, WIDE>(from, q.vectors, bytes, to + i);
      continue;
    }
    for (int64_t g = 0; g < q.group; g += 4) {
      four_of_four<FIELDS, WIDE>(from, q.vectors + g * FIELDS * width, bytes, to + g * BLOCK + i);
    }
  }
}

template <int FIELDS>
KS_INLINE void fast(const Query& q, const uint8_t* codes, int64_t n, int32_t* to) {
#if defined(__AVX512VNNI__)
  fast_products<FIELDS, true>(q, codes, n, to);
#else
  // sums over eight bytes of two vectors of codes fit 16 bits, but for fields of 4 bits those of one vector
  if (q.bytes > (FIELDS == 2 ? 32 : 64)) return fast_products<FIELDS, true>(q, codes, n, to);
  fast_products<FIELDS, false>(q, codes, n, to);
#endif
}
#endif

// Products of the codes of `n` <= BLOCK tokens, [group up to a multiple of 4, BLOCK].
KS_INLINE void products(const Query& q, const uint8_t* codes, int64_t n, int32_t* to) {
#if defined(__AVX2__)
  if (q.fast) {
    if (q.planes == 1) return fast<8>(q, codes, n, to);
    if (q.planes == 2) return fast<4>(q, codes, n, to);
    return fast<2>(q, codes, n, to);
  }
#endif
  plain_products(q, codes, n, to);
}

}  // namespace
}  // namespace KS_ISA
}  // namespace ks
