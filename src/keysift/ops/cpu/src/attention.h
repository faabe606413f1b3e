// What the attention kernels share: where rows lie, and how a query's shares of the keys are merged.
#pragma once

#include "abi.h"

namespace ks {

constexpr int64_t PADDED = 32;  // head dims are padded to a multiple of it in scratch memory

inline int64_t padded(int64_t dim) { return (dim + PADDED - 1) / PADDED * PADDED; }

// A share of a query's keys is folded into `partial_floats(dim)` floats: the weighted sum of values in pair order, then
// the highest logit and the sum of weights relative to it.
inline int64_t partial_floats(int64_t dim) { return padded(dim) + 16; }

// Where the rows of one sequence and one KV head lie; byte strides.
struct Reach {
  const char *k, *v;              // of the head; without a table of the sequence
  int64_t k_page, k_row, k_head;  // between pages, rows of a page, heads
  int64_t v_page, v_row, v_head;
  const int32_t* table;  // pages of the sequence, or null
  int64_t page, pages;   // rows a page, and how many pages there are
  int64_t shift;         // log2 of page, or -1
  int64_t capacity;      // rows that the sequence can address
};

// Queries of one KV head (or of one list), and how their logits come about.
struct Queries {
  const void* q;
  int64_t stride;  // between queries, in elements
  int32_t dtype;
  int32_t kv_dtype;
  int64_t count, dim, v_dim;
  float scale;
};

// A finished query: the merge of its shares.
struct MergeTask {
  const float* parts;  // of the first share
  int64_t stride;      // between shares, in floats
  int64_t shares;
  int64_t v_dim;
  int32_t kv_dtype, out_dtype;
  void* out;
  float* lse;
};

}  // namespace ks
