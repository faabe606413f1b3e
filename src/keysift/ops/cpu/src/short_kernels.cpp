// A share of all rows of a view, for all heads: rows of a token hold the heads side by side, so memory is fetched in
// its order, a tile ahead, while the heads of a tile are computed one by one.
#include "attention_tile.h"
#include "short.h"

namespace ks {
namespace KS_ISA {
namespace {

inline __attribute__((always_inline)) bool find_rows(const ShortTask& task, int64_t j, Rows* rows) {
  bool exist = true;
  rows->n = int(most(0, least(TILE, task.to - j)));
  for (int i = 0; i < rows->n; i++) exist &= locate(task.reach, task.start + j + i, &rows->k[i], &rows->v[i]);
  return exist;
}

// What is to be fetched while head h is computed: its share of the next tile, rows one by one with all their heads.
inline __attribute__((always_inline)) Ahead fetch_next(const char* const* row, int rows, int64_t head_bytes, int64_t h,
                                                       int64_t heads, int64_t bytes, const char** piece) {
  int64_t at = h * rows / heads, head = h * rows % heads;
  for (int i = 0; i < rows; i++) {
    piece[i] = row[at] + head * head_bytes;
    if (++head == heads) {
      head = 0;
      at++;
    }
  }
  return Ahead::of(piece, rows, bytes);
}

template <class Dot, class T>
bool share(const ShortTask& task) {
  const Queries& queries = task.queries;
  const int64_t count = queries.count, dim = queries.dim, v_dim = queries.v_dim, heads = task.kv_heads;
  const int64_t size = partial_floats(v_dim), sums = padded(v_dim), q_size = padded(dim), tokens = count / task.group;
  float* z = (float*)task.memory;
  float* shrink = z + count * TILE;
  typename Dot::Packed* q = (typename Dot::Packed*)(shrink + ceil_to(count, 16));
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t m = 0; m < count; m++) {
      const int64_t at = m / task.group * task.q_token + (h * task.group + m % task.group) * task.q_head;
      pack_query<Dot>(queries.q, queries.dtype, at, dim, q + (h * count + m) * q_size);
    }
  }
  begin(task.partial, heads * count, v_dim);

  Rows tiles[2], own;
  const char* piece[TILE];
  bool exist = find_rows(task, task.from, &tiles[0]);
  for (int64_t j = task.from, turn = 0; j < task.to; j += TILE, turn ^= 1) {
    const Rows& rows = tiles[turn];
    Rows& next = tiles[turn ^ 1];
    exist &= find_rows(task, j + TILE, &next);
    own.n = rows.n;
    for (int64_t h = 0; h < heads; h++) {
      for (int i = 0; i < rows.n; i++) {
        own.k[i] = rows.k[i] + h * task.reach.k_head;
        own.v[i] = rows.v[i] + h * task.reach.v_head;
      }
      float* partial = task.partial + h * count * size;
      dots<Dot, T>(q + h * count * q_size, count, own, dim, z,
                   fetch_next(next.k, next.n, task.reach.k_head, h, heads, dim * sizeof(T), piece));
      for (int64_t m = 0; m < count; m++) {
        const int64_t seen =
            task.length - tokens + m / task.group + 1 - j;  // rows of the tile before the query, and its own
        float* state = partial + m * size + sums;
        rescale(z + m * TILE, rows.n, queries.scale, nullptr);
        shrink[m] = soften<TILE>(z + m * TILE, least(seen, rows.n), state, state + 1);
      }
      fold<T>(z, count, own, v_dim, shrink, partial, size,
              fetch_next(next.v, next.n, task.reach.v_head, h, heads, v_dim * sizeof(T), piece));
    }
  }
  return exist;
}

bool any_share(const ShortTask& task) {
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

KS_DEFINE_TABLE(ShortKernels, few) = {KS_ISA::any_share, KS_ISA::merge};

}  // namespace ks
