// Quest's pages: how bounds and scores are shared out, and the rows of the best pages.
#include "pages.h"

#include <cmath>

#include "pool.h"
#include "select.h"

namespace ks {
namespace {

template <class Args>
void check(const Args& a) {
  require(a.batch >= 0 && a.kv_heads >= 1 && a.dim >= 1, "batch, kv_heads, dim: out of range");
  require(a.start && a.length, "start and length are needed");
  require(a.unit >= 1 && (!a.table || a.page % a.unit == 0), "unit must divide a page");
}

// Pages that a sequence may read: of a count that the caller gives, or of its quota.
int64_t wanted_pages(const ks_page_top_args& a, int64_t b) {
  int64_t wanted;
  if (a.count) {
    wanted = a.count[b];
  } else {
    const int64_t length = a.length[b] > 0 ? a.length[b] : 0;
    int64_t keys = int64_t(a.quota_share * float(length)) + a.quota_keys;
    keys = keys < 1 ? 1 : keys;
    wanted = (keys < length ? keys : length) / a.unit;
    wanted = wanted < 1 ? 1 : wanted;
  }
  return wanted < a.most_pages ? wanted : a.most_pages;
}

void top_pages(
    const ks_page_top_args& a, const PagesKernels& kernels, const SelectKernels& order, int64_t b, int64_t list
) {
  const Span view = span_of(a, b);
  const Pages in_view = pages_of(a, view);
  int32_t* best = scratch<int32_t>(1, a.most_pages + 2 * a.pages + 1);
  const float* value = a.score + (b * a.heads + list) * a.pages;
  if (a.shared) {
    float* weight = reinterpret_cast<float*>(best + a.most_pages);
    kernels.weights(a, b, list, weight);
    value = weight;
  }
  const int64_t able = in_view.end - in_view.first;
  uint32_t* keys = reinterpret_cast<uint32_t*>(best + a.most_pages + a.pages);
  order.keys(value + in_view.first, able, keys);
  const int64_t number = choose(keys, able, wanted_pages(a, b), best);
  int32_t* to = a.rows + (b * a.lists + list) * a.most_pages * a.unit;
  int32_t* const begin = to;
  for (int64_t i = 0; i < number; i++) {
    const int64_t page = in_view.first + best[i];
    const int64_t low = page * a.unit, high = low + a.unit;
    const int64_t end = high < view.end ? high : view.end;
    for (int64_t t = low > view.begin ? low : view.begin; t < end; t++) *to++ = int32_t(view.first + t);
  }
  a.used[b * a.lists + list] = int32_t(to - begin);
}

}  // namespace

extern "C" {

KS_EXPORT int ks_page_extend(const ks_page_extend_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    const PagesKernels& kernels = KS_TABLE(pages, isa);
    parallel_for(a->batch * a->pages, a->threads, [&](int64_t i) {
      const int64_t b = i / a->pages;
      const Span view = span_of(*a, b);
      const int64_t done = a->done[b] - view.first, low = done > view.begin ? done : view.begin;
      const int64_t page = low / a->unit + i % a->pages;
      if (page < pages_of(*a, view).end) kernels.extend(*a, b, page, scratch<float>(1, 3 * (a->dim + 16)));
    });
  });
}

KS_EXPORT int ks_page_score(const ks_page_score_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    require(a->heads >= 1 && a->heads % a->kv_heads == 0, "heads must be a multiple of kv_heads");
    const int64_t parts = (a->pages + LSE_PAGES - 1) / LSE_PAGES;
    const PagesKernels& kernels = KS_TABLE(pages, isa);
    parallel_for(a->batch * a->kv_heads * parts, a->threads, [&](int64_t i) {
      const int64_t pair = i / parts;
      float* buffer = scratch<float>(1, kernels.score_buffer(*a));
      kernels.score({a, pair / a->kv_heads, pair % a->kv_heads, i % parts, buffer});
    });
  });
}

KS_EXPORT int ks_page_top(const ks_page_top_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    require(a->lists == (a->shared ? a->kv_heads : a->heads), "lists: out of range");
    const PagesKernels& kernels = KS_TABLE(pages, isa);
    const SelectKernels& order = KS_TABLE(select, isa);
    parallel_for(a->batch * a->lists, a->threads,
                 [&](int64_t i) { top_pages(*a, kernels, order, i / a->lists, i % a->lists); });
  });
}
}

}  // namespace ks
