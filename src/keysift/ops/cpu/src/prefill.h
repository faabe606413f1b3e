// Causal attention of the last positions of each sequence over lists of key blocks.
#pragma once

#include "attention.h"
#include "dispatch.h"

struct ks_prefill_args {
  KS_ARGS_HEAD
  const void *q, *k, *v;  // q [B, T, H, D]; k, v [B, S, K, *], or [pages, page, K, *] with a table
  int64_t q_stride0, q_stride1;
  int64_t k_stride0, k_stride1, k_stride2, v_stride0, v_stride1, v_stride2;
  const int32_t* table;                         // [B, *], or null
  int64_t table_stride, page, pages, capacity;  // capacity: rows that a sequence can address
  int64_t batch, heads, kv_heads, dim, v_dim;
  int64_t q_stride2, tokens, keys;  // keys of each sequence; queries are its last positions
  const int64_t* start;             // row of position 0, [B]
  const int32_t *full_count, *full_index, *partial_count, *partial_index;  // contiguous [B, H, Q, *]; null: all blocks
  int64_t full_width, partial_width, query_blocks, first, block;  // first: position of query block 0, in blocks
  int64_t lo, hi;                                                 // positions of the queries that are computed
  void* out;                                                      // [B, hi - lo, H, Dv] contiguous
  float* lse;                                                     // [B, hi - lo, H] contiguous, or null
  int32_t q_dtype, kv_dtype, out_dtype;
  float scale;
};

struct ks_row_mass_args {
  KS_ARGS_HEAD
  const void *q, *k, *v;  // as above; v is not read
  int64_t q_stride0, q_stride1;
  int64_t k_stride0, k_stride1, k_stride2, v_stride0, v_stride1, v_stride2;
  const int32_t* table;
  int64_t table_stride, page, pages, capacity;
  int64_t batch, heads, kv_heads, dim, v_dim;
  int64_t q_stride2, tokens, keys;
  const int64_t *start, *position;  // row of position 0, [B]; ascending positions of queries, [rows]
  int64_t rows, block;
  float* mass;  // [B, H, rows, ceil(keys / block)] contiguous, zeros
  int32_t q_dtype, kv_dtype, out_dtype;
  float scale;
};

namespace ks {

constexpr int64_t KEY_TILE = 64;

// One query block of one head.
struct PrefillTask {
  Reach reach;      // of the KV head
  Queries queries;  // count of them, from position `position` on; stride between tokens
  int64_t position, start, keys, block;
  const int32_t *full, *partial;  // lists of key blocks; full null: blocks 0 .. full_count - 1
  int64_t full_count, partial_count;
  void* out;      // of the first query
  float* lse;     // or null
  int64_t heads;  // out and lse of the next query are so many rows further
  int32_t out_dtype;
  void* memory;  // of prefill_bytes(count, dim, v_dim)
};

// Packed queries, weights (in two types), sums and states; packed keys (twice) and values of a tile.
inline int64_t prefill_bytes(int64_t count, int64_t dim, int64_t v_dim) {
  const int64_t rows = count + 16, d = padded(dim), e = padded(v_dim);
  return 4 * (rows * (d + 2 * KEY_TILE + e + 3) + KEY_TILE * (2 * d + e)) + 16 * 64;
}

// Some rows of all heads of a group: what share of its attention each gives to each block of keys.
struct MassTask {
  Reach reach;
  Queries queries;          // of the rows' heads: query i of head g is queries.q + i * stride + g * head_stride
  int64_t head_stride;      // in elements
  const int64_t* position;  // of the rows
  int64_t rows, group, first;  // first: position of queries.q
  int64_t start, block;
  float* mass;                     // of the first row and head
  int64_t row_stride, mass_heads;  // between rows, and between heads
  void* memory;                    // of prefill_bytes(rows * group, dim, dim)
};

struct PrefillKernels {
  bool (*run)(const PrefillTask&);  // false: a key block or a page that does not exist
  bool (*mass)(const MassTask&);
};
KS_DECLARE_TABLES(PrefillKernels, prefill)

}  // namespace ks
