// A share of a list of rows.
#include "attention_tile.h"
#include "gather.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int AHEAD = 2;  // tiles whose rows are on their way

// Row numbers of a tile from position j on, and where they lie.
inline __attribute__((always_inline)) bool find_rows(const GatherTask& task, int64_t j, Rows* rows) {
  bool exist = true;
  rows->n = int(least(TILE, task.to - j));
  for (int i = 0; i < rows->n; i++) {
    const int64_t at = j + i, chosen = at - task.outside;
    int64_t row;
    if (chosen < 0) {
      row = at < task.before ? task.first + at : task.behind + at - task.before;
    } else {
      row = task.long_rows ? ((const int64_t*)task.rows)[chosen] : ((const int32_t*)task.rows)[chosen];
    }
    exist &= locate(task.reach, row, &rows->k[i], &rows->v[i]);
  }
  return exist;
}

// What a law needs besides the dots: of each query q.mean and 1 / |q|; the mean itself; below which |k - mean|^2 is
// rounding.
struct About {
  const float* mean;
  const float *q_mean, *per_norm;
  float least_square;
};

template <class T>
inline About prepare_law(const GatherTask& task, float* memory) {
  const Queries& queries = task.queries;
  const int64_t dim = queries.dim, size = padded(dim);
  float *mean = memory, *q_mean = mean + size, *per_norm = q_mean + queries.count;
  float square = 0;
  for (int64_t i = 0; i < size; i++) {
    const float x = i < dim ? task.mean[i] : 0;
    mean[paired(i, (const T*)nullptr)] = x;
    square += x * x;
  }
  for (int64_t m = 0; m < queries.count; m++) {
    float with_mean = 0, norm = 0;
    for (int64_t i = 0; i < dim; i++) {
      const int64_t at = m * queries.stride + i;
      const float x = queries.dtype == FP32   ? ((const float*)queries.q)[at]
                      : queries.dtype == BF16 ? to_float(((const bf16_t*)queries.q)[at])
                                              : to_float(((const fp16_t*)queries.q)[at]);
      with_mean += x * task.mean[i];
      norm += x * x;
    }
    q_mean[m] = with_mean;
    per_norm[m] = 1 / __builtin_sqrtf(norm > 1e-16f ? norm : 1e-16f);
  }
  return {mean, q_mean, per_norm, 1e-10f * square + 1e-37f};
}

// 1 / |k - mean| of each row; 0 for a key that is the mean, to which the rounding of q.k must not give an angle.
template <class T>
inline __attribute__((always_inline)) void reciprocal_norms(const About& about, const Rows& rows, int64_t dim,
                                                            float* out) {
  for (int r = 0; r < rows.n; r += 4) {
    const T* k[4];
    f32v square[4];
    for (int i = 0; i < 4; i++) {
      k[i] = (const T*)rows.k[r + i < rows.n ? r + i : rows.n - 1];
      square[i] = zero();
    }
    for (int64_t d = 0; d < dim; d += UNIT) {
      const f32v first = load(about.mean + d), second = load(about.mean + d + W);
      for (int i = 0; i < 4; i++) {
        const pair x = dim - d >= UNIT ? load2(k[i] + d) : load2_part(k[i] + d, dim - d);
        square[i] = fma(x.first - first, x.first - first, square[i]);
        square[i] = fma(x.second - second, x.second - second, square[i]);
      }
    }
    const f32x4 four = sums(square[0], square[1], square[2], square[3]);
    for (int i = 0; i < 4; i++) {
      out[r + i] = four[i] > about.least_square ? 1 / __builtin_sqrtf(four[i]) : 0;
    }
  }
}

// Log weights of a tile for query m, from its dots: the table at their cosines, linear between entries.
inline __attribute__((always_inline)) void log_weights(const GatherTask& task, const About& about,
                                                       const float* per_norm, int64_t m, const float* z, float* out) {
  const f32v half = set1(float(task.entries - 1) * 0.5f);
  const f32v last = set1(float(task.entries - 2));
  for (int i = 0; i < TILE; i += W) {
    const f32v cosine = (load(z + i) - set1(about.q_mean[m])) * set1(about.per_norm[m]) * load(per_norm + i);
    const f32v at = lowest(highest(fma(cosine, half, half), zero()), half + half);
    const f32v left = lowest(to_floats(to_int(at - set1(0.5f))), last);  // at or one below, where at is whole
    const i32v entry = to_int(highest(left, zero()));
    const f32v low = gather(task.law, entry), high = gather(task.law + 1, entry);
    store(out + i, fma(high - low, at - to_floats(entry), low));
  }
}

template <class Dot, class T>
bool share(const GatherTask& task) {
  const Queries& queries = task.queries;
  const int64_t count = queries.count, dim = queries.dim, size = partial_floats(queries.v_dim),
                sums = padded(queries.v_dim);
  float* z = (float*)task.memory;
  float* shrink = z + count * TILE;
  typename Dot::Packed* q = (typename Dot::Packed*)(shrink + ceil_to(count, 16));
  float* rest = (float*)(q + count * padded(dim));
  const About about = task.law ? prepare_law<T>(task, rest) : About();
  for (int64_t m = 0; m < count; m++) {
    pack_query<Dot>(queries.q, queries.dtype, m * queries.stride, dim, q + m * padded(dim));
  }
  begin(task.partial, count, queries.v_dim);

  Rows tiles[AHEAD + 1];
  bool exist = true;
  for (int i = 0; i < AHEAD && task.from + i * TILE < task.to; i++) {
    exist &= find_rows(task, task.from + i * TILE, &tiles[i]);
  }
  for (int64_t j = task.from, turn = 0; j < task.to; j += TILE, turn = (turn + 1) % (AHEAD + 1)) {
    const Rows& rows = tiles[turn];
    Rows& next = tiles[(turn + AHEAD) % (AHEAD + 1)];
    next.n = 0;
    if (j + AHEAD * TILE < task.to) exist &= find_rows(task, j + AHEAD * TILE, &next);
    dots<Dot, T>(q, count, rows, dim, z, Ahead::of(next.k, next.n, dim * sizeof(T)));

    float per_norm[TILE] = {}, weight[TILE];
    const int64_t exact = least(most(task.outside - j, 0), rows.n);  // rows of the tile outside the middle: weight 1
    if (task.law) reciprocal_norms<T>(about, rows, dim, per_norm);
    for (int64_t m = 0; m < count; m++) {
      const float* log_w = nullptr;
      if (task.law || (task.log_w && exact)) {
        if (task.law) log_weights(task, about, per_norm, m, z + m * TILE, weight);
        for (int i = 0; i < rows.n; i++) {
          weight[i] = i < exact ? 0 : task.law ? weight[i] : task.log_w[j + i - task.outside];
        }
        log_w = weight;
      } else if (task.log_w) {
        log_w = task.log_w + (j - task.outside);
      }
      float* state = task.partial + m * size + sums;
      rescale(z + m * TILE, rows.n, queries.scale, log_w);
      shrink[m] = soften<TILE>(z + m * TILE, rows.n, state, state + 1);
    }
    fold<T>(z, count, rows, queries.v_dim, shrink, task.partial, size,
            Ahead::of(next.v, next.n, queries.v_dim * sizeof(T)));
  }
  return exist;
}

bool any_share(const GatherTask& task) {
  switch (task.queries.kv_dtype) {
    case FP32:
      return share<WideDot<float>, float>(task);
    case FP16:
      return share<WideDot<fp16_t>, fp16_t>(task);
    default:
#ifdef KS_ISA_AVX512_BF16
      if (task.queries.dtype == BF16) return share<Bf16Dot, bf16_t>(task);
#endif
      return share<WideDot<bf16_t>, bf16_t>(task);
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(GatherKernels, gather) = {KS_ISA::any_share, KS_ISA::merge};

}  // namespace ks
