// Selection kernels on every path that this CPU has, for the sanitizers: memory exactly as large as it has to be, sizes
// that no vector divides, and results that do not depend on the number of threads.
#include <cstdio>
#include <cstring>
#include <vector>

#include "key_codes.h"
#include "pages.h"
#include "select.h"
#include "tables.h"

extern "C" {
int ks_isas(int64_t* of_library, int64_t* of_cpu);
const char* ks_last_error();
int ks_hash_planes(const ks_hash_planes_args*);
int ks_hash_query(const ks_hash_query_args*);
int ks_match(const ks_match_args*);
int ks_list_hits(const ks_list_hits_args*);
int ks_tables_build(const ks_tables_build_args*);
int ks_tables_match(const ks_tables_match_args*);
int ks_tables_list(const ks_tables_list_args*);
int ks_key_hash(const ks_key_hash_args*);
int ks_key_sample(const ks_key_sample_args*);
int ks_page_extend(const ks_page_extend_args*);
int ks_page_score(const ks_page_score_args*);
int ks_page_top(const ks_page_top_args*);
int ks_choose(const ks_choose_args*);
}

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s (%s)\n", what, ks_last_error());
  failures++;
}

uint32_t state = 1;

uint32_t random_bits() { return state = ks::mix(state + 0x9E3779B9u); }

// Pages of `page` rows for two sequences, or rows in one piece, with queries.
struct World {
  int64_t dim, group, page, kv_heads = 2, batch = 2, pages = 0, end = 391;
  int32_t dtype;
  std::vector<uint16_t> k, q;
  std::vector<int32_t> table;
  std::vector<int64_t> start{3, 40}, length{388, 200}, done{3, 40};

  World(int64_t dim, int64_t group, int64_t page, int32_t dtype) : dim(dim), group(group), page(page), dtype(dtype) {
    const int64_t each = page ? (end + page - 1) / page : 1, rows = page ? page : end;
    pages = batch * each;
    for (int64_t i = 0; i < pages && page; i++) table.push_back(int32_t(pages - 1 - i));
    for (int64_t i = 0; i < pages * rows * kv_heads * dim; i++) k.push_back(number());
    for (int64_t i = 0; i < batch * kv_heads * group * dim; i++) q.push_back(number());
  }

  uint16_t number() const {  // of size 1/2 to 2, in either type of 16 bits
    const uint16_t sign = uint16_t(random_bits() & 0x8000);
    return uint16_t(sign | (dtype == ks::BF16 ? 0x3f00 + (random_bits() & 0xff) : 0x3800 + (random_bits() & 0x7ff)));
  }

  int64_t rows() const { return page ? page : end; }
  int64_t heads() const { return kv_heads * group; }

  template <class Args>
  Args args(int32_t isa, int32_t threads) const {
    Args a;
    std::memset(static_cast<void*>(&a), 0, sizeof a);
    a.size = sizeof a, a.isa = isa, a.threads = threads;
    a.k = k.data(), a.k_dtype = dtype;
    a.k_stride_0 = rows() * kv_heads * dim, a.k_stride_1 = kv_heads * dim, a.k_stride_head = dim;
    a.table = page ? table.data() : nullptr, a.table_stride = pages / batch, a.page = page;
    a.start = start.data(), a.length = length.data();
    a.batch = batch, a.bound = end, a.kv_heads = kv_heads, a.dim = dim;
    return a;
  }
};

using Rows = std::vector<int32_t>;

template <class T>
void add(Rows& to, const std::vector<T>& from) {
  for (const T& x : from) {
    int32_t bits = 0;
    std::memcpy(&bits, &x, sizeof x < 4 ? sizeof x : 4);
    to.push_back(bits);
  }
}

// Codes, matches and their lists, with tables of their own; what the bucket tables say is the same.
Rows codes(const World& w, int32_t isa, int32_t threads) {
  state = 1;  // the same directions in every call
  const int64_t bits = 3, tables = 9, columns = bits * tables, per = (w.rows() + 127) / 128;
  std::vector<int32_t> planes(size_t(w.pages * w.kv_heads * per * columns * 4));
  std::vector<float> mean(size_t(w.batch * w.kv_heads * w.dim));
  std::vector<float> threshold(size_t(w.batch * w.kv_heads * columns), 0.1f);
  std::vector<uint16_t> directions;
  const World other(w.dim, 1, 0, ks::BF16);
  for (int64_t i = 0; i < w.kv_heads * columns * w.dim; i++) directions.push_back(other.k[size_t(i) % other.k.size()]);
  auto hash = w.args<ks_hash_planes_args>(isa, threads);
  hash.planes = planes.data(), hash.planes_stride_entry = columns * 4, hash.planes_stride_head = per * columns * 4;
  hash.planes_stride_0 = w.kv_heads * per * columns * 4;
  hash.mean = mean.data(), hash.threshold = threshold.data(), hash.w = directions.data(), hash.w_dtype = ks::BF16;
  hash.w_stride_head = columns * w.dim, hash.columns = columns, hash.done = w.done.data(), hash.most = 200;
  expect(ks_hash_planes(&hash) == 0, "hash_planes");
  const std::vector<int64_t> then{203, 240}, rest{380, 240};
  hash.done = then.data(), hash.most = 177;
  expect(ks_hash_planes(&hash) == 0, "hash_planes again");
  hash.done = rest.data(), hash.most = 11;
  expect(ks_hash_planes(&hash) == 0, "hash_planes of few");

  std::vector<int32_t> query(size_t(w.batch * w.heads() * tables));
  ks_hash_query_args of_query = {};
  of_query.size = sizeof of_query, of_query.isa = isa, of_query.threads = threads;
  of_query.q = w.q.data(), of_query.q_dtype = w.dtype, of_query.q_stride_b = w.heads() * w.dim;
  of_query.q_stride_head = w.dim, of_query.w = directions.data(), of_query.w_dtype = ks::BF16;
  of_query.w_stride_head = columns * w.dim, of_query.batch = w.batch, of_query.heads = w.heads();
  of_query.kv_heads = w.kv_heads, of_query.dim = w.dim, of_query.bits = bits, of_query.tables = tables;
  of_query.codes = query.data();
  expect(ks_hash_query(&of_query) == 0, "hash_query");

  const int64_t entries = w.page ? (w.end + w.page - 1) / w.page * per : (w.end + 127) / 128;
  Rows counts(size_t(w.batch * w.heads())), hits(size_t(w.batch * w.heads() * entries * 4));
  auto match = w.args<ks_match_args>(isa, threads);
  match.planes = planes.data(), match.planes_stride_0 = hash.planes_stride_0;
  match.planes_stride_head = hash.planes_stride_head, match.planes_stride_entry = hash.planes_stride_entry;
  match.codes = query.data(), match.heads = w.heads(), match.bits = bits, match.tables = tables;
  match.hits = hits.data(), match.entries = entries, match.counts = counts.data();
  expect(ks_match(&match) == 0, "match");
  int32_t width = 0;
  for (int32_t n : counts) width = n > width ? n : width;
  Rows rows(size_t(w.batch * w.heads() * width), -1);
  auto list = w.args<ks_list_hits_args>(isa, threads);
  list.hits = hits.data(), list.heads = w.heads(), list.entries = entries, list.rows = rows.data(), list.width = width;
  expect(ks_list_hits(&list) == 0 && width > 0, "list_hits");

  Rows column, again(counts.size()), same(rows.size(), -1);
  for (int64_t l = 0; l < tables; l++) {
    for (int64_t b = 0; b < bits; b++) column.push_back(int32_t(b * tables + l));
  }
  std::vector<uint16_t> ids(size_t(w.batch * w.kv_heads * tables * w.end));
  Rows offsets(size_t(w.batch * w.kv_heads * tables * 9));
  std::vector<uint64_t> bitmap(size_t(w.batch * w.heads() * ks::SEGMENT_WORDS));
  auto build = w.args<ks_tables_build_args>(isa, threads);
  build.ids = ids.data(), build.room = w.end, build.offsets = offsets.data(), build.segments = 1;
  build.columns = column.data(), build.tables = tables, build.bits = bits, build.planes = planes.data();
  build.planes_stride_0 = hash.planes_stride_0, build.planes_stride_head = hash.planes_stride_head;
  build.planes_stride_entry = hash.planes_stride_entry;
  expect(ks_tables_build(&build) == 0, "tables_build");
  auto find = w.args<ks_tables_match_args>(isa, threads);
  find.ids = ids.data(), find.room = w.end, find.offsets = offsets.data(), find.segments = 1;
  find.columns = column.data(), find.tables = tables, find.bits = bits, find.codes = query.data();
  find.words = tables, find.heads = w.heads(), find.hits = bitmap.data(), find.counts = again.data();
  expect(ks_tables_match(&find) == 0 && again == counts, "tables find what planes find");
  auto named = w.args<ks_tables_list_args>(isa, threads);
  named.hits = bitmap.data(), named.segments = 1, named.heads = w.heads(), named.rows = same.data();
  named.width = width;
  expect(ks_tables_list(&named) == 0 && same == rows, "tables list what planes list");
  add(rows, counts);
  add(rows, planes);
  return rows;
}

// A draw by codes of a few bits, of pages that lie apart.
Rows draws(const World& w, int64_t planes, int32_t isa, int32_t threads) {
  int64_t code_dim = 16;
  state = 1;
  while (code_dim < w.dim) code_dim *= 2;
  const int64_t bytes = code_dim * planes / 8, lists = w.heads(), most = 60;
  const int64_t codes_pitch = w.kv_heads + 1, sizes_pitch = w.kv_heads + 2;
  const auto heads_over = [&](int64_t pitch) { return (w.pages - 1) * pitch + w.kv_heads; };
  std::vector<uint8_t> side(size_t(heads_over(codes_pitch) * w.rows() * bytes)), overflow(size_t(w.batch * lists));
  std::vector<uint16_t> sizes(size_t(heads_over(sizes_pitch) * w.rows())), rotation;
  std::vector<float> mean(size_t(w.batch * w.kv_heads * w.dim), 0.25f);
  for (int64_t i = 0; i < w.kv_heads * w.dim * w.dim; i++) {
    rotation.push_back(uint16_t(0x3d00 | (random_bits() & 0x80ff)));
  }
  auto hash = w.args<ks_key_hash_args>(isa, threads);
  hash.codes = side.data(), hash.sizes = sizes.data(), hash.tokens = w.rows(), hash.planes = planes;
  hash.codes_pitch = codes_pitch, hash.sizes_pitch = sizes_pitch, hash.code_dim = code_dim, hash.mean = mean.data();
  hash.w = rotation.data(), hash.done = w.done.data(), hash.most = w.end, hash.step = 0.9957f;
  expect(ks_key_hash(&hash) == 0, "key_hash");
  std::vector<int8_t> weights(size_t(w.batch * w.heads() * code_dim));
  std::vector<float> line(size_t(2 * w.batch * w.heads())), log_c(line.size() / 2);
  std::vector<float> expected(log_c.size()), log_w(log_c.size() * most), scores(log_c.size() * size_t(w.end));
  Rows rows(log_w.size(), -1), counts(log_c.size());
  const std::vector<int64_t> positions{400, 300};
  auto a = w.args<ks_key_sample_args>(isa, threads);
  a.codes = side.data(), a.sizes = sizes.data(), a.tokens = w.rows(), a.planes = planes, a.code_dim = code_dim;
  a.codes_pitch = codes_pitch, a.sizes_pitch = sizes_pitch;
  a.q = w.q.data(), a.q_stride_b = w.heads() * w.dim, a.q_stride_head = w.dim, a.q_dtype = w.dtype;
  a.w = rotation.data(), a.heads = w.heads(), a.weights = weights.data(), a.line = line.data(), a.log_c = log_c.data();
  a.lists = lists, a.positions = positions.data(), a.rows = rows.data(), a.log_w = log_w.data();
  a.counts = counts.data(), a.expected = expected.data(), a.overflow = overflow.data(), a.most_rows = most;
  a.quota_keys = 30, a.scores = scores.data(), a.row = 2, a.sample = 128, a.scale = 0.1f, a.state = 77;
  a.stages = ks::PROBE | ks::FACTORS | ks::DRAW | ks::ESTIMATE;
  expect(ks_key_sample(&a) == 0 && counts[0] > 0, "key_sample");
  add(rows, counts);
  add(rows, side);
  add(rows, scores);
  return rows;
}

// The rows of the best of Quest's pages.
Rows best_pages(const World& w, int32_t isa, int32_t threads) {
  const int64_t unit = 16, slots = (w.rows() + unit - 1) / unit, pages = (w.end + unit - 1) / unit;
  const int64_t parts = (pages + 63) / 64, most = 5;
  std::vector<uint16_t> bounds(size_t(w.pages * w.kv_heads * slots * 2 * w.dim));
  std::vector<float> score(size_t(w.batch * w.heads() * pages)), lse(size_t(w.batch * w.heads() * parts));
  Rows rows(size_t(w.batch * w.kv_heads * most * unit), -1), used(size_t(w.batch * w.kv_heads));
  auto lay = [&](auto& a) {
    a.bounds = bounds.data(), a.bounds_stride_half = w.dim, a.bounds_stride_slot = 2 * w.dim, a.unit = unit;
    a.bounds_stride_head = slots * 2 * w.dim, a.bounds_stride_0 = w.kv_heads * slots * 2 * w.dim;
  };
  auto extend = w.args<ks_page_extend_args>(isa, threads);
  lay(extend);
  extend.done = w.done.data(), extend.pages = pages;
  expect(ks_page_extend(&extend) == 0, "page_extend");
  auto a = w.args<ks_page_score_args>(isa, threads);
  lay(a);
  a.q = w.q.data(), a.q_stride_b = w.heads() * w.dim, a.q_stride_head = w.dim, a.q_dtype = w.dtype;
  a.heads = w.heads(), a.pages = pages, a.score = score.data(), a.lse = lse.data(), a.scale = 0.1f;
  expect(ks_page_score(&a) == 0, "page_score");
  auto top = w.args<ks_page_top_args>(isa, threads);
  lay(top);
  top.score = score.data(), top.lse = lse.data(), top.heads = w.heads(), top.pages = pages, top.parts = parts;
  top.lists = w.kv_heads, top.shared = 1, top.quota_share = 0.2f, top.most_pages = most, top.rows = rows.data();
  top.used = used.data();
  expect(ks_page_top(&top) == 0 && used[0] > 0, "page_top");
  add(rows, used);
  add(rows, score);
  return rows;
}

Rows chosen(int32_t isa, int32_t threads) {
  std::vector<float> score(3 * 1003);
  for (size_t i = 0; i < score.size(); i++) score[i] = float((i * 7919) % 513) / 64;
  const std::vector<int64_t> count{1, 40, 2000};
  Rows index(3 * 1003, -1), used(3);
  for (double share : {-1.0, 0.7}) {
    ks_choose_args a = {};
    a.size = sizeof a, a.isa = isa, a.threads = threads, a.score = score.data(), a.stride = a.entries = 1003;
    a.rows = 3, a.count = count.data(), a.share = share, a.index = index.data(), a.most = 1003, a.used = used.data();
    expect(ks_choose(&a) == 0 && used[1] > 0, "choose");
    add(used, index);
    used.resize(3 + index.size());
  }
  return index;
}

}  // namespace

int main() {
  int64_t of_library, of_cpu;
  ks_isas(&of_library, &of_cpu);
  const World worlds[] = {{64, 4, 64, ks::BF16}, {40, 7, 0, ks::FP16}, {7, 1, 48, ks::BF16}, {128, 2, 16, ks::BF16}};
  for (int32_t isa = ks::PORTABLE; isa <= ks::NEON; isa++) {
    if (!(of_cpu >> isa & 1)) continue;
    for (const World& w : worlds) {
      expect(codes(w, isa, 1) == codes(w, isa, 3), "threads change no codes");
      expect(best_pages(w, isa, 1) == best_pages(w, isa, 3), "threads change no pages");
      for (int64_t planes : {1, 2, 4, 8}) {
        expect(draws(w, planes, isa, 1) == draws(w, planes, isa, 3), "threads change no draws");
      }
    }
    expect(chosen(isa, 1) == chosen(isa, 3), "threads change no choice");
  }
  std::printf("selection: %d failures\n", failures);
  return failures != 0;
}
