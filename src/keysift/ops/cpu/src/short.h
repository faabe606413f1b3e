// Causal attention of a few new tokens, or of one, over all rows of a view.
#pragma once

#include "attention.h"
#include "dispatch.h"

struct ks_short_args {
  KS_ARGS_HEAD
  const void *q, *k, *v;  // q [B, T, H, D]; k, v [B, S, K, *], or [pages, page, K, *] with a table
  int64_t q_stride0, q_stride1;
  int64_t k_stride0, k_stride1, k_stride2, v_stride0, v_stride1, v_stride2;
  const int32_t* table;                         // [B, *], or null
  int64_t table_stride, page, pages, capacity;  // capacity: rows that a sequence can address
  int64_t batch, heads, kv_heads, dim, v_dim;
  int64_t q_stride2, tokens;
  const int64_t *start, *length;  // [B]
  void* out;                      // [B, T, H, Dv] contiguous
  float* lse;                     // [B, T, H] contiguous
  int32_t q_dtype, kv_dtype, out_dtype;
  float scale;
};

namespace ks {

// Rows from .. to - 1 of a view, for all heads: queries of a KV head are numbered m = t * group + g.
struct ShortTask {
  Reach reach;
  Queries queries;                           // of one KV head: count = tokens * group
  int64_t kv_heads, group, q_token, q_head;  // strides in elements
  int64_t start, length;                     // of the view
  int64_t from, to;
  float* partial;  // of query m of KV head h at (h * count + m) * partial_floats(v_dim)
  void* memory;    // of short_bytes(kv_heads, count, dim)
};

// Packed queries of all heads, and weights of a tile of one.
inline int64_t short_bytes(int64_t kv_heads, int64_t count, int64_t dim) {
  return kv_heads * count * padded(dim) * 4 + count * (32 + 1) * 4 + 4096;
}

struct ShortKernels {
  bool (*share)(const ShortTask&);  // false: a page that does not exist
  void (*merge)(const MergeTask&);
};
KS_DECLARE_TABLES(ShortKernels, few)

}  // namespace ks
