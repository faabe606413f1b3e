// Codes in bit planes: how hashing, matching and listing are shared out.
#include "codes.h"

#include <vector>

#include "pool.h"

namespace ks {
namespace {

constexpr int64_t FEW_ROWS = 24;      // new tokens of a sequence for which directions are not packed
constexpr int64_t SOME_COLUMNS = 128;  // directions of a task that hashes few tokens
constexpr int64_t SOME_TABLES = 16;
constexpr int64_t PADDING = 16;       // numbers of the widest vector

struct Job {
  int64_t b, low, high, first, count;  // sequence, new tokens, entries
};

template <class Args>
void check_view(const Args& a) {
  require(a.batch >= 0 && a.kv_heads >= 1 && a.dim >= 1, "batch, kv_heads, dim: out of range");
  require(!a.table || a.page >= 1, "a table needs a page");
  require(a.start && a.length, "start and length are needed");
}

std::vector<Job> new_tokens(const ks_hash_planes_args& a) {
  std::vector<Job> jobs;
  for (int64_t b = 0; b < a.batch; b++) {
    const Span view = span_of(a, b);
    const int64_t done = a.done[b] - view.first, low = done > view.begin ? done : view.begin;
    const int64_t high = view.end < low + a.most ? view.end : low + a.most;
    if (low >= high) continue;
    const int64_t first = entry_of(a, low);
    jobs.push_back({b, low, high, first, entry_of(a, high - 1) - first + 1});
  }
  return jobs;
}

int64_t padded(int64_t dim) { return (dim + PADDING - 1) / PADDING * PADDING; }

void hash_few(const ks_hash_planes_args& a, const CodesKernels& kernels, const std::vector<Job>& jobs) {
  const int64_t parts = (a.columns + SOME_COLUMNS - 1) / SOME_COLUMNS;
  const int64_t tasks = int64_t(jobs.size()) * a.kv_heads * parts;
  parallel_for(tasks, a.threads, [&](int64_t i) {
    const Job& job = jobs[size_t(i / parts / a.kv_heads)];
    const int64_t column = i % parts * SOME_COLUMNS;
    const int64_t end = column + SOME_COLUMNS < a.columns ? column + SOME_COLUMNS : a.columns;
    float* buffer = scratch<float>(1, (job.high - job.low + 1) * (padded(a.dim) + 1) + PADDING);
    kernels.hash_rows({&a, job.b, i / parts % a.kv_heads, job.low, job.high, column, end, buffer});
  });
}

void hash_many(const ks_hash_planes_args& a, const CodesKernels& kernels, const std::vector<Job>& jobs) {
  Directions w;
  w.packing = kernels.packing(a.k_dtype);
  w.steps = w.packing == AS_FP32 ? a.dim : (a.dim + 1) / 2;
  w.columns = (a.columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
  const int64_t heads = a.w_stride_head ? a.kv_heads : 1;
  w.packed = scratch<int32_t>(0, heads * w.columns * (w.steps + 1));
  w.scale = reinterpret_cast<float*>(w.packed + heads * w.columns * w.steps);
  parallel_for(heads, a.threads, [&](int64_t head) {
    kernels.pack(a, w, head, scratch<float>(1, padded(a.dim)));
  });
  std::vector<int64_t> before{0};
  for (const Job& job : jobs) before.push_back(before.back() + job.count);
  // heads of an entry one after the other: their keys lie side by side
  parallel_for(before.back() * a.kv_heads, a.threads, [&](int64_t i) {
    const int64_t entry = i / a.kv_heads;
    size_t j = 0;
    while (before[j + 1] <= entry) j++;
    void* buffer = scratch(1, kernels.hash_buffer(a, w));
    kernels.hash({&a, &w, jobs[j].b, i % a.kv_heads, jobs[j].first + entry - before[j], jobs[j].low, jobs[j].high,
                  buffer});
  });
}

// Entries of a view: the first, and one past the last.
template <class Args>
void entries_of(const Args& a, int64_t b, int64_t* first, int64_t* end) {
  const Span view = span_of(a, b);
  *first = *end = 0;
  if (view.begin >= view.end) return;
  *first = entry_of(a, view.begin);
  *end = entry_of(a, view.end - 1) + 1;
}

void match(const ks_match_args& a, const MatchKernels& kernels) {
  const int64_t group = a.heads / a.kv_heads;
  struct Part {
    int64_t b, entry, end;
  };
  std::vector<Part> parts;
  for (int64_t b = 0; b < a.batch; b++) {
    int64_t first, end;
    entries_of(a, b, &first, &end);
    require(end <= a.entries, "the view reaches past its entries");
    for (int64_t e = first; e < end; e += MATCH_ENTRIES) {
      parts.push_back({b, e, e + MATCH_ENTRIES < end ? e + MATCH_ENTRIES : end});
    }
  }
  const int64_t tasks = int64_t(parts.size()) * a.kv_heads, bytes = kernels.match_buffer(a);
  std::vector<int32_t> counts(size_t(tasks * group), 0);
  parallel_for(tasks, a.threads, [&](int64_t i) {
    const Part& part = parts[size_t(i) % parts.size()];
    kernels.match({&a, part.b, i / int64_t(parts.size()), part.entry, part.end, counts.data() + i * group,
                   scratch(1, bytes)});
  });
  for (int64_t i = 0; i < a.batch * a.heads; i++) a.counts[i] = 0;
  for (int64_t i = 0; i < tasks; i++) {
    int32_t* to = a.counts + parts[size_t(i) % parts.size()].b * a.heads + i / int64_t(parts.size()) * group;
    for (int64_t g = 0; g < group; g++) to[g] += counts[size_t(i * group + g)];
  }
}

void list_hits(const ks_list_hits_args& a, int64_t b, int64_t head) {
  int64_t e, end;
  entries_of(a, b, &e, &end);
  const Span view = span_of(a, b);
  const int64_t per = a.table ? entries_a_page(a) : 0;
  int32_t* to = a.rows + (b * a.heads + head) * a.width;
  int32_t* const full = to + a.width;
  if (a.after) to += a.after[b * a.heads + head];
  for (; e < end; e++) {
    const int64_t token = per ? e / per * a.page + e % per * UNIT : e * UNIT;
    for (int64_t i = 0; i < WORDS; i++) {
      uint32_t word = uint32_t(a.hits[((b * a.heads + head) * a.entries + e) * WORDS + i]);
      const int32_t row = int32_t(view.first + token + i * 32);
      for (; word && to < full; word &= word - 1) *to++ = row + __builtin_ctz(word);
    }
  }
}

}  // namespace

extern "C" {

KS_EXPORT int ks_hash_planes(const ks_hash_planes_args* a) {
  return guarded(a, [&](Isa isa) {
    check_view(*a);
    const std::vector<Job> jobs = new_tokens(*a);
    int64_t most = 0;
    for (const Job& job : jobs) most = job.high - job.low > most ? job.high - job.low : most;
    const CodesKernels& kernels = KS_TABLE(codes, isa);
    if (most > FEW_ROWS) return hash_many(*a, kernels, jobs);
    hash_few(*a, kernels, jobs);
  });
}

KS_EXPORT int ks_hash_query(const ks_hash_query_args* a) {
  return guarded(a, [&](Isa isa) {
    require(a->kv_heads >= 1 && a->heads % a->kv_heads == 0, "heads must be a multiple of kv_heads");
    require(a->bits >= 1 && a->bits <= 32, "bits must be 1 to 32");
    const int64_t parts = (a->tables + SOME_TABLES - 1) / SOME_TABLES;
    const int64_t queries = a->batch * (a->heads / a->kv_heads);
    const CodesKernels& kernels = KS_TABLE(codes, isa);
    parallel_for(queries ? parts * a->kv_heads : 0, a->threads, [&](int64_t i) {
      const int64_t table = i % parts * SOME_TABLES;
      const int64_t end = table + SOME_TABLES < a->tables ? table + SOME_TABLES : a->tables;
      float* buffer = scratch<float>(1, (queries + 1) * (padded(a->dim) + 1));
      kernels.hash_query(*a, i / parts, table, end, buffer);
    });
  });
}

KS_EXPORT int ks_match(const ks_match_args* a) {
  return guarded(a, [&](Isa isa) {
    check_view(*a);
    require(a->heads % a->kv_heads == 0, "heads must be a multiple of kv_heads");
    require(a->bits >= 1 && a->bits <= 32 && a->tables >= 1, "bits, tables: out of range");
    require(!a->words || (a->masks_count >= 1 && a->masks_count <= 32), "a pool's word has 1 to 32 tables");
    match(*a, KS_TABLE(codes_match, isa));
  });
}

KS_EXPORT int ks_list_hits(const ks_list_hits_args* a) {
  return guarded(a, [&](Isa) {
    check_view(*a);
    parallel_for(a->batch * a->heads, a->threads,
                     [&](int64_t i) { list_hits(*a, i / a->heads, i % a->heads); });
  });
}
}

}  // namespace ks
