// A view of cached keys and where side data of its tokens lie, as keysift.types.KV says. No code but of constants.
#pragma once

#include <cstdint>

#include "abi.h"

// Fields that the arguments of all selection kernels have in common; keysift/ops/select_cpu.py mirrors them.
#define KS_VIEW_FIELDS                                                             \
  const void* k;            /* keys; null where they are not read */               \
  int64_t k_stride_0;       /* of pages, or of sequences without a table */        \
  int64_t k_stride_1;       /* of rows */                                          \
  int64_t k_stride_head;                                                           \
  const int32_t* table;     /* [batch, *], or null */                              \
  int64_t table_stride;                                                            \
  const int64_t* start;     /* [batch] */                                          \
  const int64_t* length;    /* [batch] */                                          \
  const int64_t* origin;    /* [batch], or null for 0 */                           \
  int64_t batch;                                                                   \
  int64_t page;             /* rows of a page; 0 without a table */                \
  int64_t bound;            /* a row that no view reaches past */                  \
  int64_t kv_heads;                                                                \
  int64_t dim;                                                                     \
  int32_t k_dtype;                                                                 \
  int32_t reserved;

namespace ks {
namespace {

struct Span {
  int64_t first;  // row of the sequence's token 0
  int64_t begin;  // the view's first token
  int64_t end;    // one past its last
};

template <class Args>
inline Span span_of(const Args& a, int64_t b) {
  const int64_t first = a.origin ? a.origin[b] : 0;
  const int64_t begin = a.start[b] - first;
  const int64_t length = a.length[b] > 0 ? a.length[b] : 0;
  return {first, begin, begin + length};
}

// Row `row` of sequence `b`, all heads: elements from the start of the keys.
template <class Args>
inline int64_t row_offset(const Args& a, int64_t b, int64_t row) {
  if (!a.table) return b * a.k_stride_0 + row * a.k_stride_1;
  return int64_t(a.table[b * a.table_stride + row / a.page]) * a.k_stride_0 + row % a.page * a.k_stride_1;
}

}  // namespace
}  // namespace ks
