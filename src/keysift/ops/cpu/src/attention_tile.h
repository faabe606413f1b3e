// Attention over a tile of rows, wherever they lie: dots, online softmax (arXiv:2307.08691), weighted sum of values,
// and the merge of shares (arXiv:2501.01005). Included by *_kernels.cpp only.
//
// Up to four queries share one reading of a row, so that a row is converted once and its parts stay in registers.
#pragma once

#include "attention.h"
#include "simd.h"

namespace ks {
namespace KS_ISA {

constexpr int TILE = 32;     // rows
constexpr int UNIT = 2 * W;  // elements that load2 gives
constexpr bool MANY_REGISTERS = W == 16;

struct Rows {
  const char* k[TILE];
  const char* v[TILE];
  int n;
};

// Where a row lies. False, and row 0 instead, where there is no such row.
KS_INLINE bool locate(const Reach& reach, int64_t row, const char** k, const char** v) {
  bool exists = uint64_t(row) < uint64_t(reach.capacity);
  row = exists ? row : 0;
  int64_t page = 0;
  if (reach.table) {
    const int64_t at = reach.shift >= 0 ? row >> reach.shift : row / reach.page;
    row -= at * reach.page;
    page = exists ? reach.table[at] : 0;
    if (uint64_t(page) >= uint64_t(reach.pages)) {
      exists = false;
      page = 0;
    }
  }
  *k = reach.k + page * reach.k_page + row * reach.k_row;
  *v = reach.v + page * reach.v_page + row * reach.v_row;
  return exists;
}

// Pieces of memory that are fetched while something else is computed, one a step.
struct Ahead {
  const char* const* piece;
  int n;
  int64_t lines;  // cache lines a piece
  int64_t offset;

  KS_INLINE Ahead none() { return {nullptr, 0, 0, 0}; }
  KS_INLINE Ahead of(const char* const* piece, int n, int64_t bytes) { return {piece, n, (bytes + 63) / 64, 0}; }
  inline __attribute__((always_inline)) void step() {
    if (n <= 0) return;
    n--;
    const char* at = *piece++;
    for (int64_t i = 0; i < lines; i++) prefetch(at + 64 * i);
  }
};

// ---- dots

// Queries in fp32, rows of any type. The query is packed in pair order and padded with zeros. A step is half a unit.
template <class T>
struct WideDot {
  typedef float Packed;
  typedef f32v Loaded;
  static constexpr int STEPS = 2;
  KS_INLINE Loaded query(const float* q, int step) { return load(q + step * W); }
  KS_INLINE Loaded row(const T* k, int step) { return load_half(k, step); }
  KS_INLINE Loaded row_part(const T* k, int64_t n, int step) {
    const pair both = load2_part(k, n);
    return step ? both.second : both.first;
  }
  KS_INLINE f32v add(f32v sum, Loaded q, Loaded k) { return fma(q, k, sum); }
  template <class S>
  KS_INLINE void pack(const S* q, int64_t dim, float* to) {
    for (int64_t i = 0; i < padded(dim); i++) to[paired(i, (const T*)nullptr)] = i < dim ? to_float(q[i]) : 0;
  }
};

#ifdef KS_ISA_AVX512_BF16
// Queries and rows both in bf16: products of pairs, summed in fp32.
struct Bf16Dot {
  typedef bf16_t Packed;
  typedef __m512i Loaded;
  static constexpr int STEPS = 1;
  KS_INLINE Loaded query(const bf16_t* q, int) { return _mm512_loadu_si512(q); }
  KS_INLINE Loaded row(const bf16_t* k, int) { return _mm512_loadu_si512(k); }
  KS_INLINE Loaded row_part(const bf16_t* k, int64_t n, int) {
    return _mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, k);
  }
  KS_INLINE f32v add(f32v sum, Loaded q, Loaded k) { return _mm512_dpbf16_ps(sum, (__m512bh)q, (__m512bh)k); }
  template <class S>
  KS_INLINE void pack(const S* q, int64_t dim, bf16_t* to) {
    for (int64_t i = 0; i < padded(dim); i++) from_float(i < dim ? to_float(q[i]) : 0, to + i);
  }
};
#endif

// Dots of M queries with R rows, of which n are there: out[m * TILE + r].
template <class Dot, class T, int M, int R>
KS_INLINE void dots_block(const typename Dot::Packed* q, int64_t q_stride, const T* const* k, int n, int64_t dim,
                          float* out) {
  f32v sum[M * R + 3];
  for (int i = 0; i < M * R + 3; i++) sum[i] = zero();
  int64_t d = 0;
  for (; d + UNIT <= dim; d += UNIT) {
    for (int step = 0; step < Dot::STEPS; step++) {
      typename Dot::Loaded row[R];
      for (int r = 0; r < R; r++) row[r] = Dot::row(k[r] + d, step);
      for (int m = 0; m < M; m++) {
        typename Dot::Loaded query = Dot::query(q + m * q_stride + d, step);
        hold(query);
        for (int r = 0; r < R; r++) sum[m * R + r] = Dot::add(sum[m * R + r], query, row[r]);
      }
    }
  }
  for (int step = 0; d < dim && step < Dot::STEPS; step++) {
    for (int r = 0; r < R; r++) {
      const typename Dot::Loaded row = Dot::row_part(k[r] + d, dim - d, step);
      for (int m = 0; m < M; m++) {
        sum[m * R + r] = Dot::add(sum[m * R + r], Dot::query(q + m * q_stride + d, step), row);
      }
    }
  }
  for (int i = 0; i < M * R; i += 4) {
    const f32x4 four = sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    for (int j = i; j < i + 4 && j < M * R; j++) {
      if (TILE % R == 0 || j % R < n) out[j / R * TILE + j % R] = four[j - i];
    }
  }
}

// Dots of M queries with all rows of a tile. As many sums as registers hold: each waits for its last addition.
template <class Dot, class T, int M>
KS_INLINE void dots_rows(const typename Dot::Packed* q, int64_t q_stride, const Rows& rows, int64_t dim, float* out,
                         Ahead& ahead) {
  constexpr int R = M == 1 ? 8 : MANY_REGISTERS ? (M == 2 ? 8 : 4) : M == 2 ? 4 : 2;
  for (int r = 0; r < rows.n; r += R) {
    const T* k[R];
    for (int i = 0; i < R; i++) k[i] = (const T*)rows.k[r + i < rows.n ? r + i : rows.n - 1];
    for (int i = 0; i < R; i++) ahead.step();
    dots_block<Dot, T, M, R>(q, q_stride, k, rows.n - r, dim, out + r);
  }
}

template <class Dot, class T>
KS_INLINE void dots(const typename Dot::Packed* q, int64_t count, const Rows& rows, int64_t dim, float* out,
                    Ahead ahead) {
  const int64_t stride = padded(dim);
  for (int64_t m = 0; m < count; m += 4) {
    const typename Dot::Packed* at = q + m * stride;
    switch (least(4, count - m)) {
      case 1:
        dots_rows<Dot, T, 1>(at, stride, rows, dim, out + m * TILE, ahead);
        break;
      case 2:
        dots_rows<Dot, T, 2>(at, stride, rows, dim, out + m * TILE, ahead);
        break;
      case 3:
        dots_rows<Dot, T, 3>(at, stride, rows, dim, out + m * TILE, ahead);
        break;
      default:
        dots_rows<Dot, T, 4>(at, stride, rows, dim, out + m * TILE, ahead);
    }
  }
}

// ---- online softmax

// Turns the logits of n rows (those after them, up to SIZE, get weight 0) into weights; returns what earlier sums
// shrink by.
template <int SIZE>
KS_INLINE float soften(float* z, int64_t n, float* top, float* total) {
  constexpr float NONE = -__builtin_inff();
  for (int64_t i = most(n, 0); i < SIZE; i++) z[i] = NONE;
  f32v high = load(z);
  for (int i = W; i < SIZE; i += W) high = highest(high, load(z + i));
  const float above = largest(high), before = *top, now = above > before ? above : before;
  const float base = now == NONE ? 0 : now;  // no row was seen yet
  f32v added = zero();
  for (int i = 0; i < SIZE; i += W) {
    const f32v weight = exp(load(z + i) - set1(base));
    store(z + i, weight);
    added = added + weight;
  }
  const float shrink = now == before ? 1.0f : exp(set1(before - base))[0];
  *top = now;
  *total = *total * shrink + sum(added);
  return shrink;
}

KS_INLINE void rescale(float* z, int64_t n, float scale, const float* log_w) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store(z + i, log_w ? fma(load(z + i), set1(scale), load(log_w + i)) : load(z + i) * set1(scale));
  for (; i < n; i++) z[i] = z[i] * scale + (log_w ? log_w[i] : 0.0f);
}

// ---- weighted sum of values

// sum[m] = sum[m] * shrink[m] + weight[m] . values, for U units of M queries.
template <class T, int M, int U, bool PART>
KS_INLINE void fold_units(const float* weight, const char* const* v, int n, int64_t d, int64_t left,
                          const float* shrink, float* sum, int64_t stride, Ahead& ahead, int pass, int passes) {
  f32v held[M][2 * U];
  for (int m = 0; m < M; m++) {
    for (int u = 0; u < 2 * U; u++) held[m][u] = load(sum + m * stride + d + u * W) * set1(shrink[m]);
  }
  int due = pass;
  for (int r = 0; r < n; r++) {
    if (r == due) {
      ahead.step();
      due += passes;
    }
    const T* row = (const T*)v[r] + d;
    f32v w[M];
    for (int m = 0; m < M; m++) w[m] = set1(weight[m * TILE + r]);
    for (int u = 0; u < U; u++) {
      const pair x = PART ? load2_part(row, left) : load2(row + u * UNIT);
      for (int m = 0; m < M; m++) held[m][2 * u] = fma(w[m], x.first, held[m][2 * u]);
      for (int m = 0; m < M; m++) held[m][2 * u + 1] = fma(w[m], x.second, held[m][2 * u + 1]);
    }
  }
  for (int m = 0; m < M; m++) {
    for (int u = 0; u < 2 * U; u++) store(sum + m * stride + d + u * W, held[m][u]);
  }
}

template <class T, int M>
KS_INLINE void fold_rows(const float* weight, const Rows& rows, int64_t dim, const float* shrink, float* sum,
                         int64_t stride, Ahead& ahead) {
  constexpr int U = M == 1 ? 4 : (M == 2 ? 2 : 1) * (MANY_REGISTERS ? 2 : 1);
  const int whole = int(dim / UNIT), passes = whole / U + whole % U + (dim % UNIT != 0);
  int pass = 0;
  int64_t d = 0;
  for (; d + U * UNIT <= dim; d += U * UNIT) {
    fold_units<T, M, U, false>(weight, rows.v, rows.n, d, 0, shrink, sum, stride, ahead, pass++, passes);
  }
  for (; d + UNIT <= dim; d += UNIT) {
    fold_units<T, M, 1, false>(weight, rows.v, rows.n, d, 0, shrink, sum, stride, ahead, pass++, passes);
  }
  if (d < dim) {
    fold_units<T, M, 1, true>(weight, rows.v, rows.n, d, dim - d, shrink, sum, stride, ahead, pass++, passes);
  }
}

template <class T>
KS_INLINE void fold(const float* weight, int64_t count, const Rows& rows, int64_t dim, const float* shrink, float* sum,
                    int64_t stride, Ahead ahead) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    fold_rows<T, 4>(weight + m * TILE, rows, dim, shrink + m, sum + m * stride, stride, ahead);
  }
  for (; m + 2 <= count; m += 2) {
    fold_rows<T, 2>(weight + m * TILE, rows, dim, shrink + m, sum + m * stride, stride, ahead);
  }
  for (; m < count; m++) {
    fold_rows<T, 1>(weight + m * TILE, rows, dim, shrink + m, sum + m * stride, stride, ahead);
  }
}

// ---- beginning and end of a share

template <class Dot>
KS_INLINE void pack_query(const void* q, int32_t dtype, int64_t at, int64_t dim, typename Dot::Packed* to) {
  if (dtype == FP32) {
    Dot::pack((const float*)q + at, dim, to);
  } else if (dtype == BF16) {
    Dot::pack((const bf16_t*)q + at, dim, to);
  } else {
    Dot::pack((const fp16_t*)q + at, dim, to);
  }
}

KS_INLINE void begin(float* partial, int64_t count, int64_t v_dim) {
  const int64_t size = partial_floats(v_dim), sums = padded(v_dim);
  for (int64_t m = 0; m < count; m++) {
    for (int64_t i = 0; i < sums; i += W) store(partial + m * size + i, zero());
    partial[m * size + sums] = -__builtin_inff();
    partial[m * size + sums + 1] = 0;
  }
}

template <class T, class O>
KS_INLINE void write_row(const float* sum, float factor, int64_t dim, O* out) {
  for (int64_t at = 0; at < dim; at += UNIT) {
    float row[UNIT];
    store2(row, load(sum + at) * set1(factor), load(sum + at + W) * set1(factor), (const T*)nullptr);
    const int64_t n = least(UNIT, dim - at);
    for (int64_t i = 0; i < n; i++) from_float(row[i], out + at + i);
  }
}

template <class T>
KS_INLINE void write_out(const MergeTask& task, const float* sum, float factor) {
  if (task.out_dtype == FP32) {
    write_row<T>(sum, factor, task.v_dim, (float*)task.out);
  } else if (task.out_dtype == BF16) {
    write_row<T>(sum, factor, task.v_dim, (bf16_t*)task.out);
  } else {
    write_row<T>(sum, factor, task.v_dim, (fp16_t*)task.out);
  }
}

// Merges the shares of a query into the first one, always in their order, and writes output and log-sum-exp.
static inline void merge(const MergeTask& task) {
  const int64_t sums = padded(task.v_dim);
  float* all = (float*)task.parts;
  float top = -__builtin_inff();
  for (int64_t s = 0; s < task.shares; s++) {
    const float other = all[s * task.stride + sums];
    top = other > top ? other : top;
  }
  float total = 0;
  for (int64_t s = 0; s < task.shares; s++) {
    const float* part = all + s * task.stride;
    const float shrink = part[sums + 1] == 0 ? 0 : exp(set1(part[sums] - top))[0];
    total += part[sums + 1] * shrink;
    if (task.shares == 1) break;
    for (int64_t i = 0; i < sums; i += W) {
      const f32v added = load(part + i) * set1(shrink);
      store(all + i, s ? load(all + i) + added : added);
    }
  }
  const float factor = total == 0 ? 0 : 1 / total;
  *task.lse = total == 0 ? -__builtin_inff() : top + __builtin_logf(total);
  if (task.kv_dtype == FP32) {
    write_out<float>(task, all, factor);
  } else if (task.kv_dtype == BF16) {
    write_out<bf16_t>(task, all, factor);
  } else {
    write_out<fp16_t>(task, all, factor);
  }
}

}  // namespace KS_ISA
}  // namespace ks
