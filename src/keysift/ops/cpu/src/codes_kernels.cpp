// Hashing of keys and queries: signs of their products with many directions.
#include "codes.h"
#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int COLUMNS = KS_WIDTH == 16 ? 12 : 5;  // multiplied with 2 W tokens: the sums fill the registers
constexpr int GROUP = 2 * W;
static_assert(TILE_COLUMNS % COLUMNS == 0 && 32 % GROUP == 0, "tiles fit");

struct AsFp32 {
  typedef f32v Sum;
  KS_INLINE Sum add(Sum sum, i32v key, int32_t w) {
    return fma((f32v)key, set1(bits_to_float(uint32_t(w))), sum);
  }
};

#if defined(__x86_64__)
struct AsInt16 {
  typedef i32v Sum;
  KS_INLINE Sum add(Sum sum, i32v key, int32_t w) {
#if defined(__AVX512VNNI__)
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)key, _mm512_set1_epi32(w));
#elif KS_WIDTH == 16
    return sum + (Sum)_mm512_madd_epi16((__m512i)key, _mm512_set1_epi32(w));
#elif KS_WIDTH == 8
    return sum + (Sum)_mm256_madd_epi16((__m256i)key, _mm256_set1_epi32(w));
#else
    return sum + (Sum)_mm_madd_epi16((__m128i)key, _mm_set1_epi32(w));
#endif
  }
};
#endif

#if defined(__AVX512BF16__)
struct AsBf16 {
  typedef f32v Sum;
  KS_INLINE Sum add(Sum sum, i32v key, int32_t w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)key, (__m512bh)_mm512_set1_epi32(w));
  }
};
#endif

int32_t packing(int32_t k_dtype) {
#if defined(__AVX512BF16__)
  if (k_dtype == BF16) return AS_BF16;
#endif
#if defined(__x86_64__)
  // products of 16-bit integers take half the time of those of floats; what is rounded away is some 2e-5 of a product
  if (k_dtype != FP32) return AS_INT16;
#endif
  return AS_FP32;
}

KS_INLINE float sum_of_squares(const float* x, int64_t n) {
  float s[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; j++) s[j] += x[i + j] * x[i + j];
  }
  for (; i < n; i++) s[0] += x[i] * x[i];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

KS_INLINE float largest_of(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    most = size > most ? size : most;
  }
  return most;
}

// The largest power of two with which a vector is no longer than `length`, and no number larger than 32,000: products
// of two such vectors, and all parts of them, then fit an int32 if their lengths do. 0 for what is no number.
KS_INLINE float power_for(const float* x, int64_t n, float length) {
  const float square = sum_of_squares(x, n), most = largest_of(x, n);
  if (!(square < 3e38f)) return 0;
  if (most < 1e-18f) return 1;
  const float by_length = length / __builtin_sqrtf(square), by_most = 32000.0f / most;
  const float limit = by_length < by_most ? by_length : by_most;
  return bits_to_float(float_to_bits(limit) & 0x7f800000);
}

KS_INLINE int32_t rounded(float x) { return int32_t(x + (x < 0 ? -0.5f : 0.5f)); }

// A vector as the 4-byte steps of a packing, `stride` steps apart.
KS_INLINE void put(const float* x, int64_t dim, int32_t packing, float scale, int32_t* to, int64_t stride) {
  if (packing == AS_FP32) {
    for (int64_t i = 0; i < dim; i++) to[i * stride] = int32_t(float_to_bits(x[i]));
    return;
  }
  for (int64_t i = 0; i < dim; i += 2) {
    const float one = x[i], two = i + 1 < dim ? x[i + 1] : 0;
    uint32_t low, high;
    if (packing == AS_INT16) {
      low = uint32_t(rounded(one * scale));
      high = uint32_t(rounded(two * scale));
    } else {
      low = float_to_bits(one) >> 16;  // they are bf16
      high = float_to_bits(two) >> 16;
    }
    to[i / 2 * stride] = int32_t((low & 0xffff) | high << 16);
  }
}

void pack(const ks_hash_planes_args& a, const Directions& w, int64_t head, float* buffer) {
  const char* from = static_cast<const char*>(a.w) + head * a.w_stride_head * bytes_of(a.w_dtype);
  for (int64_t c = 0; c < w.columns; c++) {
    int32_t* to = w.packed + (head * w.columns + c) * w.steps;
    if (c < a.columns) {
      widen(from + c * a.dim * bytes_of(a.w_dtype), a.w_dtype, a.dim, buffer);
    } else {
      for (int64_t i = 0; i < a.dim; i++) buffer[i] = 0;
    }
    const float scale = w.packing == AS_INT16 ? power_for(buffer, a.dim, 32600.0f) : 1;
    w.scale[head * w.columns + c] = scale;
    put(buffer, a.dim, w.packing, scale, to, 1);
  }
}

KS_INLINE float rounded_to(float x, int32_t dtype) {
  if (dtype == BF16) {
    bf16_t y;
    from_float(x, &y);
    return to_float(y);
  }
  if (dtype == FP16) {
    fp16_t y;
    from_float(x, &y);
    return to_float(y);
  }
  return x;
}

// The key of a token; without thresholds it is centred, and rounded as the authors' code rounds it.
KS_INLINE void key_to_hash(const ks_hash_planes_args& a, int64_t b, int64_t head, int64_t row, float* to) {
  key_of(a, row_offset(a, b, row) + head * a.k_stride_head, to);
  if (a.threshold) return;
  const float* mean = a.mean + (b * a.kv_heads + head) * a.dim;
  for (int64_t i = 0; i < a.dim; i++) to[i] = rounded_to(to[i] - rounded_to(mean[i], a.k_dtype), a.k_dtype);
}

KS_INLINE int64_t group_bytes(const ks_hash_planes_args&, const Directions& w) { return HALF * w.steps * 4; }

int64_t hash_buffer(const ks_hash_planes_args& a, const Directions& w) {
  return group_bytes(a, w) + HALF * 4 + ceil_to(a.dim, 16) * 4;
}

// Which lanes of a sum exceed a threshold.
KS_INLINE i32v above(f32v sum, float least, float, const float*) { return sum > set1(least); }
// Integers are compared with the threshold rounded down, of which no bit is lost: scales are powers of two.
KS_INLINE i32v above(i32v sum, float least, float scale, const float* scales) {
  const f32v limit = floor_of(set1(least * scale) * load(scales));
  return sum > cut(least_of(most_of(limit, set1(-2147483520.0f)), set1(2147483520.0f)));
}

// The bits that 2 W tokens have in some columns, shifted to their place in a word.
template <class As>
KS_INLINE void tile(
    const int32_t* keys, const int32_t* w, int64_t steps, const float* least, const float* column_scales,
    const float* scales, int shift, uint32_t* words
) {
  typename As::Sum sum[COLUMNS][2] = {};
  for (int64_t s = 0; s < steps; s++) {
    const i32v one = load_int(keys + s * GROUP), two = load_int(keys + s * GROUP + W);
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; c++) {
      sum[c][0] = As::add(sum[c][0], one, w[c * steps + s]);
      sum[c][1] = As::add(sum[c][1], two, w[c * steps + s]);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < COLUMNS; c++) {
    const uint32_t low = signs(above(sum[c][0], least[c], column_scales[c], scales));
    const uint32_t high = signs(above(sum[c][1], least[c], column_scales[c], scales + W));
    words[c] |= (low | high << W) << shift;
  }
}

template <class As>
void half(const HashTask& t, const Entry& entry, int64_t from, const int32_t* keys, const float* scales) {
  const ks_hash_planes_args& a = *t.a;
  const int64_t of_head = (t.b * a.kv_heads + t.head) * a.columns;
  const int32_t* w = t.w->packed + (a.w_stride_head ? t.head : 0) * t.w->columns * t.w->steps;
  const float* of_column = t.w->scale + (a.w_stride_head ? t.head : 0) * t.w->columns;
  int32_t* planes = a.planes + entry.at;
  for (int64_t c = 0; c < a.columns; c += COLUMNS) {
    const int64_t some = least(COLUMNS, a.columns - c);
    float limit[COLUMNS] = {};
    for (int64_t i = 0; i < some && a.threshold; i++) limit[i] = a.threshold[of_head + c + i];
    for (int64_t word = from / 32; word < (from + HALF) / 32; word++) {
      const int64_t token = entry.token + word * 32;
      const uint32_t fresh = bits_between(t.low - token, least(t.high, entry.stop) - token);
      if (!fresh) continue;
      uint32_t bits[COLUMNS] = {};
      for (int g = 0; g < 32; g += GROUP) {
        const int64_t at = word * 32 - from + g;
        tile<As>(keys + at * t.w->steps, w + c * t.w->steps, t.w->steps, limit, of_column + c, scales + at, g, bits);
      }
      for (int64_t i = 0; i < some; i++) {
        int32_t* to = planes + (c + i) * WORDS + word;
        *to = int32_t((uint32_t(*to) & ~fresh) | (bits[i] & fresh));
      }
    }
  }
}

// One entry of one KV head, half after half.
void hash(const HashTask& t) {
  const ks_hash_planes_args& a = *t.a;
  const Entry entry = entry_at(a, t.b, t.head, t.entry);
  const int64_t zero = span_of(a, t.b).first, steps = t.w->steps;
  int32_t* keys = static_cast<int32_t*>(t.buffer);
  float* scales = reinterpret_cast<float*>(keys + HALF * steps);
  float* key = scales + HALF;
  const int64_t low = most(t.low, entry.token), high = least(t.high, entry.stop);
  for (int64_t from = 0; from < UNIT; from += HALF) {
    const int64_t token = entry.token + from;
    if (token >= high || token + HALF <= low) continue;
    for (int64_t i = 0; i < HALF; i++) {
      int32_t* to = keys + i / GROUP * GROUP * steps + i % GROUP;
      const bool fresh = token + i >= low && token + i < high;
      scales[i] = 1;
      if (!fresh) {
        for (int64_t s = 0; s < steps; s++) to[s * GROUP] = 0;
        continue;
      }
      key_to_hash(a, t.b, t.head, zero + token + i, key);
      if (t.w->packing == AS_INT16) scales[i] = power_for(key, a.dim, 65000.0f);
      put(key, a.dim, t.w->packing, scales[i], to, GROUP);
    }
    if (t.w->packing == AS_FP32) half<AsFp32>(t, entry, from, keys, scales);
#if defined(__x86_64__)
    if (t.w->packing == AS_INT16) half<AsInt16>(t, entry, from, keys, scales);
#endif
#if defined(__AVX512BF16__)
    if (t.w->packing == AS_BF16) half<AsBf16>(t, entry, from, keys, scales);
#endif
  }
}

// ---- few vectors ----------------------------------------------------------------------------------------------------

// Products of a direction with `n` vectors of `width` numbers.
KS_INLINE void products(const float* w, const float* x, int64_t n, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float* at = x + i * width;
    f32v s[4] = {};
    for (int64_t d = 0; d < width; d += W) {
      const f32v row = load(w + d);
      for (int j = 0; j < 4; j++) s[j] = fma(row, load(at + j * width + d), s[j]);
    }
    const f32x4 four = sums(s[0], s[1], s[2], s[3]);
    std::memcpy(to + i, &four, sizeof four);
  }
  for (; i < n; i++) to[i] = dot(w, x + i * width, width);
}

KS_INLINE void padded(const void* from, int32_t dtype, int64_t dim, int64_t width, float* to) {
  widen(from, dtype, dim, to);
  for (int64_t i = dim; i < width; i++) to[i] = 0;
}

// Some columns of a few new tokens: directions are read as they are.
void hash_rows(const HashRowsTask& t) {
  const ks_hash_planes_args& a = *t.a;
  const int64_t width = ceil_to(a.dim, W), n = t.high - t.low, zero = span_of(a, t.b).first;
  float* direction = t.buffer;
  float* keys = direction + width;
  for (int64_t i = 0; i < n; i++) {
    key_to_hash(a, t.b, t.head, zero + t.low + i, keys + i * width);
    for (int64_t d = a.dim; d < width; d++) keys[i * width + d] = 0;
  }
  const char* w = static_cast<const char*>(a.w) + t.head * a.w_stride_head * bytes_of(a.w_dtype);
  const float* limit = a.threshold ? a.threshold + (t.b * a.kv_heads + t.head) * a.columns : nullptr;
  float* product = keys + n * width;
  for (int64_t c = t.column; c < t.column_end; c++) {
    padded(w + c * a.dim * bytes_of(a.w_dtype), a.w_dtype, a.dim, width, direction);
    products(direction, keys, n, width, product);
    for (int64_t i = 0; i < n;) {
      const Entry entry = entry_at(a, t.b, t.head, entry_of(a, t.low + i));
      int32_t* to = a.planes + entry.at + c * WORDS;
      for (; i < n && t.low + i < entry.stop; i++) {
        const int64_t at = t.low + i - entry.token;
        const uint32_t bit = uint32_t(1) << at % 32, old = uint32_t(to[at / 32]);
        to[at / 32] = int32_t(product[i] > (limit ? limit[c] : 0) ? old | bit : old & ~bit);
      }
    }
  }
}

// Codes of some tables for all queries of a KV head.
void hash_query(const ks_hash_query_args& a, int64_t head, int64_t table, int64_t table_end, float* buffer) {
  const int64_t group = a.heads / a.kv_heads, n = a.batch * group, width = ceil_to(a.dim, W);
  float* direction = buffer;
  float* queries = direction + width;
  float* product = queries + n * width;
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = i / group * a.q_stride_b + (head * group + i % group) * a.q_stride_head;
    padded(static_cast<const char*>(a.q) + at * bytes_of(a.q_dtype), a.q_dtype, a.dim, width, queries + i * width);
  }
  const char* w = static_cast<const char*>(a.w) + head * a.w_stride_head * bytes_of(a.w_dtype);
  for (int64_t bit = 0; bit < a.bits; bit++) {
    for (int64_t l = table; l < table_end; l++) {
      padded(w + (bit * a.tables + l) * a.dim * bytes_of(a.w_dtype), a.w_dtype, a.dim, width, direction);
      products(direction, queries, n, width, product);
      for (int64_t i = 0; i < n; i++) {
        int32_t* code = a.codes + (i / group * a.heads + head * group + i % group) * a.tables + l;
        const uint32_t old = bit ? uint32_t(*code) : 0;
        *code = int32_t(old | uint32_t(product[i] > 0) << bit);
      }
    }
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(CodesKernels, codes) = {KS_ISA::packing, KS_ISA::pack,      KS_ISA::hash_buffer,
                                        KS_ISA::hash,    KS_ISA::hash_rows, KS_ISA::hash_query};

}  // namespace ks
