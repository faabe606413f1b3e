// Attention of one query a head over selected rows.
#pragma once

#include "attention.h"
#include "dispatch.h"

struct ks_gather_args {
  KS_ARGS_HEAD
  const void *q, *k, *v;  // q [B, H, D]; k, v [B, S, K, *], or [pages, page, K, *] with a table
  int64_t q_stride0, q_stride1;
  int64_t k_stride0, k_stride1, k_stride2, v_stride0, v_stride1, v_stride2;
  const int32_t* table;                         // [B, *], or null
  int64_t table_stride, page, pages, capacity;  // capacity: rows that a sequence can address
  int64_t batch, heads, kv_heads, dim, v_dim, slots;
  const void *rows, *count;  // [B, slots, *] and [B, slots]
  int64_t rows_stride0, rows_stride1, count_stride0, count_stride1, width;
  const float* log_w;  // as rows, or null
  int64_t log_w_stride0, log_w_stride1;
  const float *mean, *law;  // [B, K, D] contiguous, and a table; or null
  int64_t entries;
  const int64_t *start, *length, *middle_start, *middle_length;  // [B], or null: only the selected rows are read
  void* out;                                                     // [B, H, Dv] contiguous
  float* lse;                                                    // [B, H] contiguous
  int32_t q_dtype, kv_dtype, out_dtype, long_rows, long_count;   // long_*: int64, otherwise int32
  float scale;
};

namespace ks {

// Positions from .. to - 1 of a list: the rows outside the middle first, then the selected ones.
struct GatherTask {
  Reach reach;
  Queries queries;
  const void* rows;
  int32_t long_rows;
  const float* log_w;  // of the selected rows, or null
  const float* mean;   // of the KV head, or null
  const float* law;
  int64_t entries;
  // row of position 0, positions before the middle, row of the position behind them, positions outside
  int64_t first, before, behind, outside;
  int64_t from, to;
  float* partial;  // of the first query; the next one's is partial_floats(v_dim) further
  void* memory;    // of gather_bytes(count, dim)
};

// Packed queries, weights of a tile, a mean and what a law needs of each query.
inline int64_t gather_bytes(int64_t count, int64_t dim) {
  return count * (padded(dim) + 32 + 64) * 4 + padded(dim) * 4 + 4096;
}

struct GatherKernels {
  bool (*share)(const GatherTask&);  // false: a row that does not exist
  void (*merge)(const MergeTask&);
};
KS_DECLARE_TABLES(GatherKernels, gather)

}  // namespace ks
