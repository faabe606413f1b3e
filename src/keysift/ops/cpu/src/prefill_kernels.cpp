// One query block over its key blocks, 64 keys at a time: keys and values are packed into panels, then two matrix
// products with an online softmax between them (FlashAttention-2, arXiv:2307.08691).
#include "attention_tile.h"
#include "prefill.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int PANEL = 2 * W;                          // columns that are computed together
constexpr int HEIGHT = W == 16 ? 8 : W == 8 ? 6 : 4;  // rows that are
constexpr int N = KEY_TILE;

struct Memory {
  float *q, *z, *p, *sum, *top, *total, *shrink, *rows, *k, *v;
};

// ---- products: four bytes of the left side are one fp32 or two bf16, of which a column's products are added

struct Wide {
  static constexpr int PER = 1;  // elements in four bytes
  KS_INLINE f32v add(f32v sum, f32v a, f32v b) { return fma(a, b, sum); }
};
#ifdef KS_ISA_AVX512_BF16
struct Pairs {
  static constexpr int PER = 2;
  KS_INLINE f32v add(f32v sum, f32v a, f32v b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// c[0 .. HEIGHT)[0 .. PANEL) = c * shrink + a . b, or a . b where there is no shrink; `depth` of a is in four bytes.
template <class Op>
KS_INLINE void product(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                       const float* shrink) {
  f32v sum[HEIGHT][2];
  for (int m = 0; m < HEIGHT; m++) {
    for (int j = 0; j < 2; j++) sum[m][j] = shrink ? load(c + m * c_stride + j * W) * set1(shrink[m]) : zero();
  }
  for (int64_t d = 0; d < depth; d++) {
    const f32v first = load(b + d * PANEL), second = load(b + d * PANEL + W);
    for (int m = 0; m < HEIGHT; m++) {
      const f32v left = set1(a[m * a_stride + d]);
      sum[m][0] = Op::add(sum[m][0], left, first);
      sum[m][1] = Op::add(sum[m][1], left, second);
    }
  }
  for (int m = 0; m < HEIGHT; m++) {
    for (int j = 0; j < 2; j++) store(c + m * c_stride + j * W, sum[m][j]);
  }
}

// ---- packing

// A 4 x 4 block of four-byte elements, transposed.
KS_INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
  f32x4 row[4], half[4];
  for (int i = 0; i < 4; i++) std::memcpy(&row[i], from + i * stride, 16);
  half[0] = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  half[1] = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  half[2] = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  half[3] = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  for (int i = 0; i < 2; i++) {
    row[2 * i] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 0, 1, 4, 5);
    row[2 * i + 1] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; i++) std::memcpy(to + i * to_stride, &row[i], 16);
}

// Keys: panels of PANEL keys, each [dim / PER][PANEL]; n of the N keys are there, the others are 0.
template <class Op, class T>
KS_INLINE void pack_keys(const char* const* k, int64_t n, int64_t dim, const Memory& memory) {
  const int64_t depth = padded(dim) / Op::PER;
  for (int64_t i = 0; i < n; i++) {
    const T* row = (const T*)k[i];
    float* to = memory.rows + i * depth;
    if (Op::PER == 2) {  // as they are
      if (dim < padded(dim)) std::memset(to, 0, size_t(depth) * 4);
      std::memcpy(to, row, size_t(dim) * sizeof(T));
      continue;
    }
    for (int64_t d = 0; d < padded(dim); d += UNIT) {
      const pair x = dim - d >= UNIT ? load2(row + d) : dim > d ? load2_part(row + d, dim - d) : pair{zero(), zero()};
      store(to + d, x.first);
      store(to + d + W, x.second);
    }
  }
  std::memset(memory.rows + n * depth, 0, size_t((N - n) * depth) * 4);
  for (int64_t i = 0; i < N; i += 4) {
    float* to = memory.k + i / PANEL * depth * PANEL + i % PANEL;
    for (int64_t d = 0; d < depth; d += 4) turn(memory.rows + i * depth + d, depth, to + d * PANEL, PANEL);
  }
}

// Values: panels of PANEL columns in pair order, each [N / PER][PANEL].
template <class T>
KS_INLINE void pack_values(Wide, const char* const* v, int64_t n, int64_t dim, const Memory& memory) {
  for (int64_t i = 0; i < N; i++) {
    for (int64_t d = 0; d < dim; d += UNIT) {
      pair x = {zero(), zero()};
      if (i < n) x = dim - d >= UNIT ? load2((const T*)v[i] + d) : load2_part((const T*)v[i] + d, dim - d);
      float* to = memory.v + d * N + i * PANEL;
      store(to, x.first);
      store(to + W, x.second);
    }
  }
}

#ifdef KS_ISA_AVX512_BF16
KS_INLINE __m512i load_words(const char* const* v, int64_t i, int64_t n, int64_t d, int64_t dim) {
  if (i >= n) return _mm512_setzero_si512();
  const bf16_t* row = (const bf16_t*)v[i] + d;
  return dim - d >= UNIT ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi16((__mmask32(1) << (dim - d)) - 1, row);
}

// Four bytes hold one column of two keys.
template <class T>
KS_INLINE void pack_values(Pairs, const char* const* v, int64_t n, int64_t dim, const Memory& memory) {
  const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
  for (int64_t i = 0; i < N; i += 2) {
    for (int64_t d = 0; d < dim; d += UNIT) {
      const __m512i a = load_words(v, i, n, d, dim), b = load_words(v, i + 1, n, d, dim);
      float* to = memory.v + d * (N / 2) + i / 2 * PANEL;
      _mm512_storeu_si512(to, _mm512_or_si512(_mm512_andnot_si512(odd, a), _mm512_slli_epi32(b, 16)));
      _mm512_storeu_si512(to + W, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(odd, b)));
    }
  }
}
#endif

// Weights of a query, as the second product wants them.
KS_INLINE const float* pack_weights(Wide, const Memory& memory, int64_t) { return memory.z; }
#ifdef KS_ISA_AVX512_BF16
KS_INLINE const float* pack_weights(Pairs, const Memory& memory, int64_t count) {
  for (int64_t i = 0; i < count * N; i += W) {
    const __m256bh narrow = _mm512_cvtneps_pbh(load(memory.z + i));
    std::memcpy((char*)memory.p + i * 2, &narrow, 32);
  }
  return memory.p;
}
#endif

// ---- a tile, a list, a query block

// Folds n keys from position `key` on into the sums of all queries.
template <class Op, class T>
KS_INLINE void tile(const PrefillTask& task, const Memory& memory, const Rows* rows, int64_t key, int64_t n,
                    bool causal) {
  const Queries& queries = task.queries;
  const int64_t count = ceil_to(queries.count, HEIGHT), depth = padded(queries.dim) / Op::PER,
                width = padded(queries.v_dim);
  const char *k[N], *v[N];
  for (int64_t i = 0; i < n; i++) {
    k[i] = rows[i / TILE].k[i % TILE];
    v[i] = rows[i / TILE].v[i % TILE];
  }
  pack_keys<Op, T>(k, n, queries.dim, memory);
  for (int64_t j = 0; j < N; j += PANEL) {
    for (int64_t m = 0; m < count; m += HEIGHT) {
      product<Op>(memory.q + m * depth, depth, memory.k + j * depth, depth, memory.z + m * N + j, N, nullptr);
    }
  }
  pack_values<T>(Op(), v, n, queries.v_dim, memory);
  for (int64_t m = 0; m < queries.count; m++) {
    const int64_t seen = causal ? least(n, task.position + m + 1 - key) : n;
    rescale(memory.z + m * N, n, queries.scale, nullptr);
    memory.shrink[m] = soften<N>(memory.z + m * N, seen, memory.top + m, memory.total + m);
  }
  const float* weights = pack_weights(Op(), memory, count);
  for (int64_t d = 0; d < queries.v_dim; d += PANEL) {
    for (int64_t m = 0; m < count; m += HEIGHT) {
      product<Op>(weights + m * (N / Op::PER), N / Op::PER, memory.v + d * (N / Op::PER), N / Op::PER,
                  memory.sum + m * width + d, width, memory.shrink + m);
    }
  }
}

template <class Op, class T>
bool walk(const PrefillTask& task, const Memory& memory, const int32_t* list, int64_t blocks, bool causal) {
  bool exist = true;
  Rows rows[N / TILE];
  for (int64_t j = 0; j < blocks; j++) {
    const int64_t first = (list ? list[j] : j) * task.block, last = least(first + task.block, task.keys);
    if (first < 0 || first >= task.keys) {
      exist = false;
      continue;
    }
    for (int64_t key = first; key < last; key += N) {
      const int64_t n = least(N, last - key);
      if (causal && key >= task.position + task.queries.count) break;
      for (int64_t i = 0; i < n; i++) {
        Rows& of = rows[i / TILE];
        exist &= locate(task.reach, task.start + key + i, &of.k[i % TILE], &of.v[i % TILE]);
      }
      tile<Op, T>(task, memory, rows, key, n, causal);
    }
  }
  return exist;
}

KS_INLINE float* take(char** memory, int64_t floats) {
  float* at = (float*)*memory;
  *memory += ceil_to(floats * 4, 64);
  return at;
}

// ---- shares of blocks

// Turns log-sum-exps of blocks into shares of their sum.
KS_INLINE void shares(float* row, int64_t blocks) {
  float top = -__builtin_inff(), total = 0;
  for (int64_t c = 0; c < blocks; c++) top = row[c] > top ? row[c] : top;
  for (int64_t c = 0; c < blocks; c += W) {
    const int64_t n = least(W, blocks - c);
    float part[W];
    for (int64_t i = 0; i < W; i++) part[i] = i < n ? row[c + i] - top : -__builtin_inff();
    const f32v weight = exp(load(part));
    total += sum(weight);
    store(part, weight);
    std::memcpy(row + c, part, size_t(n) * 4);
  }
  for (int64_t c = 0; c < blocks; c++) row[c] /= total;
}

template <class Op, class Dot, class T>
bool mass(const MassTask& task) {
  const Queries& queries = task.queries;
  const int64_t used = task.rows * task.group, count = ceil_to(used, HEIGHT), dim = padded(queries.dim),
                depth = dim / Op::PER;
  char* left = (char*)task.memory;
  Memory memory = {};
  memory.q = take(&left, count * depth);
  memory.z = take(&left, count * N);
  memory.top = take(&left, count);
  memory.total = take(&left, count);
  memory.rows = take(&left, N * depth);
  memory.k = take(&left, N * depth);
  std::memset(memory.q, 0, size_t(count * depth) * 4);
  for (int64_t m = 0; m < used; m++) {
    const int64_t row = m / task.group, head = m % task.group;
    const int64_t at = (task.position[row] - task.first) * queries.stride + head * task.head_stride;
    pack_query<Dot>(queries.q, queries.dtype, at, queries.dim, (typename Dot::Packed*)(memory.q + m * depth));
  }
  bool exist = true;
  const int64_t keys = task.position[task.rows - 1] + 1, blocks = (keys + task.block - 1) / task.block;
  for (int64_t c = 0; c < blocks; c++) {
    const int64_t last = least((c + 1) * task.block, keys);
    for (int64_t m = 0; m < used; m++) memory.top[m] = -__builtin_inff(), memory.total[m] = 0;
    for (int64_t key = c * task.block; key < last; key += N) {
      const int64_t n = least(N, last - key);
      const char *k[N], *v;
      for (int64_t i = 0; i < n; i++) exist &= locate(task.reach, task.start + key + i, &k[i], &v);
      pack_keys<Op, T>(k, n, queries.dim, memory);
      for (int64_t j = 0; j < N; j += PANEL) {
        for (int64_t m = 0; m < count; m += HEIGHT) {
          product<Op>(memory.q + m * depth, depth, memory.k + j * depth, depth, memory.z + m * N + j, N, nullptr);
        }
      }
      for (int64_t m = 0; m < used; m++) {
        const int64_t seen = least(n, task.position[m / task.group] + 1 - key);
        rescale(memory.z + m * N, n, queries.scale, nullptr);
        soften<N>(memory.z + m * N, seen, memory.top + m, memory.total + m);
      }
    }
    for (int64_t m = 0; m < used; m++) {
      float* to = task.mass + m / task.group * task.row_stride + m % task.group * task.mass_heads + c;
      *to = memory.total[m] == 0 ? -__builtin_inff() : memory.top[m] + __builtin_logf(memory.total[m]);
    }
  }
  for (int64_t m = 0; m < used; m++) {
    shares(task.mass + m / task.group * task.row_stride + m % task.group * task.mass_heads, blocks);
  }
  return exist;
}

bool any_mass(const MassTask& task) {
  switch (task.queries.kv_dtype) {
    case FP32:
      return mass<Wide, WideDot<float>, float>(task);
    case FP16:
      return mass<Wide, WideDot<fp16_t>, fp16_t>(task);
    default:
#ifdef KS_ISA_AVX512_BF16
      if (task.queries.dtype == BF16) return mass<Pairs, Bf16Dot, bf16_t>(task);
#endif
      return mass<Wide, WideDot<bf16_t>, bf16_t>(task);
  }
}

// ---- a query block

template <class Op, class Dot, class T>
bool run(const PrefillTask& task) {
  const Queries& queries = task.queries;
  const int64_t count = ceil_to(queries.count, HEIGHT), dim = padded(queries.dim), width = padded(queries.v_dim);
  char* left = (char*)task.memory;
  Memory memory;
  memory.q = take(&left, count * dim / Op::PER);
  memory.z = take(&left, count * N);
  memory.p = take(&left, count * N / 2);
  memory.sum = take(&left, count * width);
  memory.top = take(&left, count);
  memory.total = take(&left, count);
  memory.shrink = take(&left, count);
  memory.rows = take(&left, N * dim / Op::PER);
  memory.k = take(&left, N * dim / Op::PER);
  memory.v = take(&left, N * width / Op::PER);
  std::memset(memory.q, 0, size_t(count * dim / Op::PER) * 4);
  for (int64_t m = 0; m < queries.count; m++) {
    pack_query<Dot>(queries.q, queries.dtype, m * queries.stride, queries.dim,
                    (typename Dot::Packed*)(memory.q + m * dim / Op::PER));
  }
  std::memset(memory.sum, 0, size_t(count * width) * 4);
  for (int64_t m = 0; m < count; m++) {
    memory.top[m] = -__builtin_inff();
    memory.total[m] = 0;
    memory.shrink[m] = 1;
  }

  bool exist = walk<Op, T>(task, memory, task.full, task.full_count, false);
  exist &= walk<Op, T>(task, memory, task.partial, task.partial_count, true);

  for (int64_t m = 0; m < queries.count; m++) {
    const float total = memory.total[m], factor = total == 0 ? 0 : 1 / total;
    MergeTask row = {};
    row.v_dim = queries.v_dim;
    row.out_dtype = task.out_dtype;
    row.out = (char*)task.out + m * task.heads * queries.v_dim * (task.out_dtype == FP32 ? 4 : 2);
    write_out<T>(row, memory.sum + m * width, factor);
    if (task.lse) task.lse[m * task.heads] = total == 0 ? -__builtin_inff() : memory.top[m] + __builtin_logf(total);
  }
  return exist;
}

bool any_run(const PrefillTask& task) {
  switch (task.queries.kv_dtype) {
    case FP32:
      return run<Wide, WideDot<float>, float>(task);
    case FP16:
      return run<Wide, WideDot<fp16_t>, fp16_t>(task);
    default:
#ifdef KS_ISA_AVX512_BF16
      if (task.queries.dtype == BF16) return run<Pairs, Bf16Dot, bf16_t>(task);
#endif
      return run<Wide, WideDot<bf16_t>, bf16_t>(task);
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(PrefillKernels, prefill) = {KS_ISA::any_run, KS_ISA::any_mass};

}  // namespace ks
