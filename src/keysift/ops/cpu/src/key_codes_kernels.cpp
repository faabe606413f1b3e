// Rotation of keys and queries, and what is kept of them: a few bits a coordinate, or integers.
#include "key_codes.h"

#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int ROWS = 6;  // rotated at a time: with two vectors of columns their sums fill the registers
constexpr float CLIP = 4.0f;

KS_INLINE float as_bf16(float x) {
  bf16_t y;
  from_float(x, &y);
  return to_float(y);
}

// Columns of the rotation that kernels work on.
KS_INLINE int64_t padded(int64_t dim) { return ceil_to(dim, 2 * W); }

// The rotation of a head as floats, [dim, padded dim].
KS_INLINE void widen_rotation(const uint16_t* w, int64_t head, int64_t dim, float* to) {
  const int64_t width = padded(dim);
  for (int64_t d = 0; d < dim; d++) {
    widen(w + (head * dim + d) * dim, BF16, dim, to + d * width);
    for (int64_t c = dim; c < width; c++) to[d * width + c] = 0;
  }
}

template <int N>
KS_INLINE void rotate_rows(const float* x, const float* w, int64_t dim, int64_t code_dim, float* y) {
  const int64_t width = padded(dim);
  for (int64_t c = 0; c < width; c += 2 * W) {
    f32v sum[N][2] = {};
    for (int64_t d = 0; d < dim; d++) {
      const f32v one = load(w + d * width + c), two = load(w + d * width + c + W);
#pragma GCC unroll 6
      for (int i = 0; i < N; i++) {
        const f32v at = set1(x[i * dim + d]);
        sum[i][0] = fma(at, one, sum[i][0]);
        sum[i][1] = fma(at, two, sum[i][1]);
      }
    }
    for (int i = 0; i < N; i++) {  // width may exceed the code's
      float both[2 * W];
      store(both, sum[i][0]);
      store(both + W, sum[i][1]);
      std::memcpy(y + i * code_dim + c, both, size_t(least(2 * W, code_dim - c)) * 4);
    }
  }
}

// `n` rows of `x` times the rotation, [n, code_dim]; 0 past the head dim.
KS_INLINE void rotate(const float* x, const float* w, int64_t n, int64_t dim, int64_t code_dim, float* y) {
  int64_t i = 0;
  for (; i + ROWS <= n; i += ROWS) rotate_rows<ROWS>(x + i * dim, w, dim, code_dim, y + i * code_dim);
  for (; i < n; i++) rotate_rows<1>(x + i * dim, w, dim, code_dim, y + i * code_dim);
  for (i = 0; i < n; i++) {
    for (int64_t c = dim; c < code_dim; c++) y[i * code_dim + c] = 0;
  }
}

KS_INLINE float square_of(const float* x, int64_t n) {
  float s[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; j++) s[j] += x[i + j] * x[i + j];
  }
  for (; i < n; i++) s[0] += x[i] * x[i];
  for (int j = 1; j < 16; j++) s[0] += s[j];
  return s[0];
}

// A vector that is rotated as bytes and a size; code_dim is a multiple of 16, and so of W.
KS_INLINE uint16_t encode(
    const float* y, float square, int64_t dim, int64_t code_dim, int64_t planes, float step, uint8_t* to, int32_t* level
) {
  const float half = float(1 << (planes - 1));
  const float unit = __builtin_sqrtf(float(dim)) / step / __builtin_sqrtf(square > 1e-30f ? square : 1e-30f);
  f32v product = zero();
  for (int64_t c = 0; c < code_dim; c += W) {
    const f32v at = load(y + c);
    const f32v low = most_of(floor_of(least_of(at * set1(unit), set1(half))) + set1(half), zero());
    const f32v clamped = least_of(low, set1(2 * half - 1));
    product = fma(at, clamped - set1(half - 0.5f), product);
    store_int(level + c, cut(clamped));
  }
  const int64_t bytes = code_dim * planes / 8, fields = 8 / planes;
  for (int64_t j = 0; j < bytes; j++) {
    int32_t byte = 0x80;
    for (int64_t f = 0; f < fields; f++) byte ^= level[f * bytes + j] << (f * planes);
    to[j] = uint8_t(byte);
  }
  const float against = sum(product) * step;
  float size = against > 0 ? square / (against > 1e-30f ? against : 1e-30f) : 0;
  fp16_t half_size;
  from_float(size < 6e4f ? size : 6e4f, &half_size);
  return half_size.bits;
}

int64_t hash_buffer(int64_t dim, int64_t code_dim) {
  return dim * padded(dim) + HASH_TOKENS * (dim + code_dim + 1) + code_dim;
}

void hash(const KeyHashTask& t) {
  const ks_key_hash_args& a = *t.a;
  const int64_t n = t.high - t.low, zero_row = span_of(a, t.b).first;
  float* w = t.buffer;
  float* x = w + a.dim * padded(a.dim);
  float* y = x + HASH_TOKENS * a.dim;
  float* square = y + HASH_TOKENS * a.code_dim;
  int32_t* level = reinterpret_cast<int32_t*>(square + HASH_TOKENS);
  widen_rotation(a.w, t.head, a.dim, w);
  const float* mean = a.mean + (t.b * a.kv_heads + t.head) * a.dim;
  for (int64_t i = 0; i < n; i++) {
    float* key = x + i * a.dim;
    key_of(a, row_offset(a, t.b, zero_row + t.low + i) + t.head * a.k_stride_head, key);
    for (int64_t d = 0; d < a.dim; d++) key[d] -= mean[d];
    square[i] = square_of(key, a.dim);
    for (int64_t d = 0; d < a.dim; d++) key[d] = as_bf16(key[d]);
  }
  rotate(x, w, n, a.dim, a.code_dim, y);
  for (int64_t i = 0; i < n; i++) {
    uint8_t* to = code_at(a, t.b, t.head, t.low + i);
    const uint16_t size = encode(y + i * a.code_dim, square[i], a.dim, a.code_dim, a.planes, a.step, to, level);
    *size_at(a, t.b, t.head, t.low + i) = size;
  }
}

// One query as integers, and the line that makes scores of their products.
KS_INLINE void integers_of(const ks_key_sample_args& a, const float* y, float square, int8_t* weights, float* line) {
  const int64_t bytes = bytes_of_code(a);
  const float half = float(1 << (a.planes - 1));
  float unit = __builtin_sqrtf(square / float(a.dim));
  unit = (unit > 1e-30f ? unit : 1e-30f) * (CLIP / 127);
  float along = 0, all = 0, last = 0;
  for (int64_t c = 0; c < a.code_dim; c++) {
    const float many = float(1 << (c / bytes * a.planes % 4)), most = __builtin_floorf(127 / many);
    float weight = __builtin_floorf(y[c] / unit / many + 0.5f);
    weight = weight > most ? most : weight < -most ? -most : weight;
    weights[c] = int8_t(weight);
    along += weight * many * y[c];
    all += weight * many;
    if (c >= a.code_dim - bytes) last += weight * many;
  }
  const float slope = along > 0 ? square / (along > 1e-30f ? along : 1e-30f) * a.scale : 0;
  line[0] = slope;
  line[1] = slope * ((half - 0.5f) * all - last * half);  // the levels of the last field count as signed
}

// The queries of one KV head.
void probe(const ks_key_sample_args& a, int64_t b, int64_t head, float* buffer) {
  const int64_t group = a.heads / a.kv_heads;
  float* w = buffer;
  float* x = w + a.dim * padded(a.dim);
  float* y = x + HASH_TOKENS * a.dim;
  widen_rotation(a.w, head, a.dim, w);
  for (int64_t g = 0; g < group; g += HASH_TOKENS) {
    const int64_t n = least(HASH_TOKENS, group - g);
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = b * a.q_stride_b + (head * group + g + i) * a.q_stride_head;
      widen(static_cast<const char*>(a.q) + at * bytes_of(a.q_dtype), a.q_dtype, a.dim, x + i * a.dim);
      for (int64_t d = 0; d < a.dim; d++) x[i * a.dim + d] = as_bf16(x[i * a.dim + d]);
    }
    rotate(x, w, n, a.dim, a.code_dim, y);
    for (int64_t i = 0; i < n; i++) {
      const int64_t h = b * a.heads + head * group + g + i;
      const float square = square_of(x + i * a.dim, a.dim);
      integers_of(a, y + i * a.code_dim, square, a.weights + h * a.code_dim, a.line + 2 * h);
    }
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(KeyCodesKernels, key_codes) = {KS_ISA::hash_buffer, KS_ISA::hash, KS_ISA::probe};

}  // namespace ks
