// Bounds and scores of Quest's pages.
#include "pages.h"

#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int TOGETHER = 4;  // heads that read bounds together
constexpr int64_t AHEAD = 4;  // pages whose bounds are being fetched

KS_INLINE void put_bounds(const float* x, int64_t n, int32_t dtype, char* to) {
  for (int64_t i = 0; i < n; i++) {  // what was read is written: nothing is rounded
    if (dtype == FP32) std::memcpy(to + 4 * i, x + i, 4);
    if (dtype == BF16) from_float(x[i], reinterpret_cast<bf16_t*>(to) + i);
    if (dtype == FP16) from_float(x[i], reinterpret_cast<fp16_t*>(to) + i);
  }
}

// The bounds of a page, all heads: over its rows in the view.
void extend(const ks_page_extend_args& a, int64_t b, int64_t page, float* buffer) {
  const Span view = span_of(a, b);
  const int64_t low = most(view.begin, page * a.unit), high = least(view.end, (page + 1) * a.unit);
  if (low >= high) return;
  const int64_t width = ceil_to(a.dim, W), bytes = bytes_of(a.k_dtype);
  float *key = buffer, *least_key = buffer + width, *most_key = buffer + 2 * width;
  for (int64_t d = a.dim; d < width; d++) key[d] = 0;
  for (int64_t head = 0; head < a.kv_heads; head++) {
    for (int64_t t = low; t < high; t++) {
      key_of(a, row_offset(a, b, view.first + t) + head * a.k_stride_head, key);
      for (int64_t d = 0; d < width; d += W) {
        const f32v at = load(key + d);
        store(least_key + d, t == low ? at : least_of(at, load(least_key + d)));
        store(most_key + d, t == low ? at : most_of(at, load(most_key + d)));
      }
    }
    char* to = static_cast<char*>(a.bounds) + bounds_of(a, b, head, page) * bytes;
    put_bounds(least_key, a.dim, a.k_dtype, to);
    put_bounds(most_key, a.dim, a.k_dtype, to + a.bounds_stride_half * bytes);
  }
}

KS_INLINE int64_t padded(int64_t dim) { return ceil_to(dim, 2 * W); }

int64_t score_buffer(const ks_page_score_args& a) {
  return (a.heads / a.kv_heads + TOGETHER) * 2 * padded(a.dim) + 2 * padded(a.dim) + TOGETHER * LSE_PAGES;
}

// Four heads' products with the maxima where a query is positive, and with the minima where it is negative.
template <class T>
KS_INLINE f32x4 four_products(const T* low, const T* high, const float* q, int64_t dim) {
  const int64_t width = padded(dim), whole = dim / (2 * W) * (2 * W);
  f32v sum[TOGETHER] = {};
  for (int64_t d = 0; d < width; d += 2 * W) {
    const pair up = d < whole ? load2(high + d) : load2_part(high + d, dim - d);
    const pair down = d < whole ? load2(low + d) : load2_part(low + d, dim - d);
#pragma GCC unroll 4
    for (int g = 0; g < TOGETHER; g++) {
      const float* at = q + g * 2 * width + 2 * d;
      sum[g] = fma(up.first, load(at), sum[g]);
      sum[g] = fma(up.second, load(at + W), sum[g]);
      sum[g] = fma(down.first, load(at + 2 * W), sum[g]);
      sum[g] = fma(down.second, load(at + 3 * W), sum[g]);
    }
  }
  return sums(sum[0], sum[1], sum[2], sum[3]);
}

// A query in the order in which bounds are read: of each 2 W numbers the positive ones, then the negative ones.
template <class T>
KS_INLINE void put_query(const float* q, int64_t dim, float* to) {
  const int64_t width = padded(dim);
  for (int64_t i = 0; i < 2 * width; i++) to[i] = 0;
  for (int64_t i = 0; i < dim; i++) {
    const int64_t at = paired(i, static_cast<const T*>(nullptr)), slot = at / (2 * W) * (4 * W) + at % (2 * W);
    to[slot] = q[i] > 0 ? q[i] : 0;
    to[slot + 2 * W] = q[i] > 0 ? 0 : q[i];
  }
}

KS_INLINE float lse_of(const float* score, int64_t n) {
  float top = -__builtin_inff();
  for (int64_t i = 0; i < n; i++) top = score[i] > top ? score[i] : top;
  if (!(top > -__builtin_inff())) return top;
  f32v total = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) total += exp(load(score + i) - set1(top));
  float all = sum(total);
  if (i < n) {
    float rest[W];
    for (int64_t j = 0; j < W; j++) rest[j] = i + j < n ? score[i + j] : -__builtin_inff();
    all += sum(exp(load(rest) - set1(top)));
  }
  return top + __builtin_logf(all);
}

template <class T>
KS_INLINE void score_part(const PageScoreTask& t) {
  const ks_page_score_args& a = *t.a;
  const int64_t group = a.heads / a.kv_heads, width = padded(a.dim), parts = (a.pages + LSE_PAGES - 1) / LSE_PAGES;
  const int64_t begin = t.part * LSE_PAGES, end = least(begin + LSE_PAGES, a.pages), h = t.b * a.heads + t.head * group;
  const Pages in_view = pages_of(a, span_of(a, t.b));
  float* one = t.buffer;
  float* queries = one + 2 * width;
  float* score = queries + ceil_to(group, TOGETHER) * 2 * width;
  for (int64_t g = 0; g < ceil_to(group, TOGETHER); g++) {
    const int64_t at = t.b * a.q_stride_b + (t.head * group + least(g, group - 1)) * a.q_stride_head;
    widen(static_cast<const char*>(a.q) + at * bytes_of(a.q_dtype), a.q_dtype, a.dim, one);
    put_query<T>(one, a.dim, queries + g * 2 * width);
  }
  for (int64_t g = 0; g < group; g += TOGETHER) {
    for (int64_t p = begin; p < end; p++) {
      if (p < in_view.first || p >= in_view.end) {
        for (int i = 0; i < TOGETHER; i++) score[i * LSE_PAGES + p - begin] = -__builtin_inff();
        continue;
      }
      const T* low = static_cast<const T*>(a.bounds) + bounds_of(a, t.b, t.head, p);
      if (p + AHEAD < in_view.end) {
        const T* later = static_cast<const T*>(a.bounds) + bounds_of(a, t.b, t.head, p + AHEAD);
        for (int64_t d = 0; d < a.dim; d += int64_t(64 / sizeof(T))) {
          prefetch(later + d);
          prefetch(later + a.bounds_stride_half + d);
        }
      }
      const f32x4 four = four_products(low, low + a.bounds_stride_half, queries + g * 2 * width, a.dim);
      for (int i = 0; i < TOGETHER; i++) score[i * LSE_PAGES + p - begin] = four[i] * a.scale;
    }
    for (int64_t i = 0; i < TOGETHER && g + i < group; i++) {
      std::memcpy(a.score + (h + g + i) * a.pages + begin, score + i * LSE_PAGES, size_t(end - begin) * 4);
      a.lse[(h + g + i) * parts + t.part] = lse_of(score + i * LSE_PAGES, end - begin);
    }
  }
}

void score(const PageScoreTask& t) {
  if (t.a->k_dtype == FP32) return score_part<float>(t);
  if (t.a->k_dtype == BF16) return score_part<bf16_t>(t);
  score_part<fp16_t>(t);
}

void weights(const ks_page_top_args& a, int64_t b, int64_t head, float* to) {
  const int64_t group = a.heads / a.kv_heads, h = b * a.heads + head * group;
  const Pages in_view = pages_of(a, span_of(a, b));
  for (int64_t p = 0; p < a.pages; p++) to[p] = -__builtin_inff();
  for (int64_t g = 0; g < group; g++) {
    const float shift = lse_of(a.lse + (h + g) * a.parts, a.parts);
    if (!(shift > -__builtin_inff())) continue;
    const float* from = a.score + (h + g) * a.pages;
    for (int64_t p = in_view.first; p < in_view.end; p += W) {
      const int64_t n = least(W, in_view.end - p);
      float at[W], sum_of[W];  // what is beyond the last page may belong to someone else
      std::memcpy(at, from + p, size_t(n) * 4);
      std::memcpy(sum_of, to + p, size_t(n) * 4);
      for (int64_t i = n; i < W; i++) at[i] = sum_of[i] = 0;
      const f32v x = load(at), before = load(sum_of);
      const f32v after = highest(before, zero()) + exp(x - set1(shift));
      store(sum_of, x > set1(-__builtin_inff()) ? after : before);
      std::memcpy(to + p, sum_of, size_t(n) * 4);
    }
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(PagesKernels, pages) = {KS_ISA::extend, KS_ISA::score_buffer, KS_ISA::score, KS_ISA::weights};

}  // namespace ks
