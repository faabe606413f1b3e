// Bounds of the keys of Quest's pages, their scores, the best of them: see keysift/ops/pages.py.
#pragma once

#include "codes_view.h"
#include "dispatch.h"

// Bounds in the dtype of the keys: minima, then maxima, each of dim numbers side by side.
#define KS_BOUNDS_FIELDS       \
  void* bounds;                \
  int64_t bounds_stride_0;     \
  int64_t bounds_stride_head;  \
  int64_t bounds_stride_slot;  \
  int64_t bounds_stride_half;  \
  int64_t unit;

extern "C" {

struct ks_page_extend_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_BOUNDS_FIELDS
  const int64_t* done;
  int64_t pages;  // that new rows of a sequence may touch
};

struct ks_page_score_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_BOUNDS_FIELDS
  const void* q;  // [batch, heads, dim]
  int64_t q_stride_b, q_stride_head;
  int64_t heads;
  int64_t pages;  // of a sequence, as far as the host knows
  float* score;   // [batch, heads, pages]
  float* lse;     // [batch, heads, parts], of LSE_PAGES scores each
  float scale;
  int32_t q_dtype;
};

struct ks_page_top_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_BOUNDS_FIELDS
  const float* score;  // [batch, heads, pages]
  const float* lse;    // [batch, heads, parts]
  int64_t heads;
  int64_t pages;
  int64_t parts;
  int64_t lists;         // kv_heads or heads
  const int64_t* count;  // [batch] pages, or null for the quota
  int64_t quota_keys;
  int64_t most_pages;
  int32_t* rows;  // [batch, lists, most_pages * unit]
  int32_t* used;  // [batch, lists]
  float quota_share;
  int32_t shared;  // a list for all heads of a group
};
}

namespace ks {
namespace {

constexpr int64_t LSE_PAGES = 64;

struct Pages {
  int64_t first, end;  // those that hold a row of the view
};

template <class Args>
inline Pages pages_of(const Args& a, const Span& view) {
  if (view.begin >= view.end) return {0, 0};
  return {view.begin / a.unit, (view.end + a.unit - 1) / a.unit};
}

// Where the bounds of a page lie: elements from the start.
template <class Args>
inline int64_t bounds_of(const Args& a, int64_t b, int64_t head, int64_t page) {
  int64_t at = b, slot = page;
  if (a.table) {
    const int64_t per = a.page / a.unit;
    at = a.table[b * a.table_stride + page / per];
    slot = page % per;
  }
  return at * a.bounds_stride_0 + head * a.bounds_stride_head + slot * a.bounds_stride_slot;
}

}  // namespace

struct PageScoreTask {
  const ks_page_score_args* a;
  int64_t b, head, part;
  float* buffer;  // score_buffer floats
};

struct PagesKernels {
  void (*extend)(const ks_page_extend_args& a, int64_t b, int64_t page, float* buffer);  // 3 * padded dim floats
  int64_t (*score_buffer)(const ks_page_score_args& a);
  void (*score)(const PageScoreTask& task);
  // what pages count with in the choice of a KV head: the sum of its heads' softmax weights
  void (*weights)(const ks_page_top_args& a, int64_t b, int64_t head, float* to);
};

KS_DECLARE_TABLES(PagesKernels, pages)

}  // namespace ks
