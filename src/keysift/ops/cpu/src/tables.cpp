// Bucket tables: built by counting, and read by counting.
#include "tables.h"

#include <cstring>

#include "pool.h"

namespace ks {
namespace {

constexpr int64_t AHEAD = 8;  // tables whose buckets are being fetched while those of one are read

template <class Args>
void check(const Args& a) {
  require(a.batch >= 0 && a.kv_heads >= 1, "batch, kv_heads: out of range");
  require(!a.table || a.page >= 1, "a table of pages needs a page");
  require(a.start && a.length, "start and length are needed");
}

template <class Args>
int32_t* offsets_of(const Args& a, int64_t b, int64_t head, int64_t table, int64_t segment) {
  const int64_t codes = (int64_t(1) << a.bits) + 1;
  return a.offsets + (((b * a.kv_heads + head) * a.tables + table) * a.segments + segment) * codes;
}

template <class Args>
uint16_t* ids_of(const Args& a, int64_t b, int64_t head, int64_t table, int64_t segment) {
  return a.ids + ((b * a.kv_heads + head) * a.tables + table) * a.room + segment * SEGMENT;
}

// Tokens of a segment that are in the view, counted from the segment's first.
struct Part {
  int64_t low, high;
};

Part part_of(const Span& view, int64_t segment) {
  const int64_t zero = segment * SEGMENT, low = view.begin > zero ? view.begin - zero : 0;
  const int64_t high = view.end - zero < SEGMENT ? view.end - zero : SEGMENT;
  return {low, high > low ? high : low};
}

// Codes of the tokens of a segment in a few tables, [tables, SEGMENT].
void read_codes(
    const ks_tables_build_args& a, const TablesKernels& kernels, int64_t b, int64_t head, int64_t table, int64_t count,
    int64_t segment, Part part, uint16_t* codes
) {
  uint16_t some[UNIT];
  for (int64_t t = part.low; t < part.high;) {
    const int64_t token = segment * SEGMENT + t;
    const Entry entry = entry_at(a, b, head, entry_of(a, token));
    const int64_t skip = token - entry.token, left = entry.stop - token;
    const int64_t n = left < part.high - t ? left : part.high - t;
    for (int64_t i = 0; i < count; i++) {
      kernels.codes(a.planes + entry.at, a.columns + (table + i) * a.bits, a.bits, some);
      std::memcpy(codes + i * SEGMENT + t, some + skip, size_t(n) * 2);
    }
    t += n;
  }
}

void sort_tokens(const uint16_t* codes, Part part, int64_t bits, int32_t* offsets, uint16_t* ids) {
  const int64_t buckets = int64_t(1) << bits;
  std::memset(offsets, 0, size_t(buckets + 1) * 4);
  for (int64_t t = part.low; t < part.high; t++) offsets[codes[t] + 1]++;
  for (int64_t c = 0; c < buckets; c++) offsets[c + 1] += offsets[c];
  for (int64_t t = part.low; t < part.high; t++) ids[offsets[codes[t]]++] = uint16_t(t);
  for (int64_t c = buckets; c > 0; c--) offsets[c] = offsets[c - 1];  // each now ends where the next began
  offsets[0] = 0;
}

void build(const ks_tables_build_args& a, const TablesKernels& kernels) {
  const int64_t groups = (a.tables + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
  parallel_for(a.batch * a.kv_heads * groups, a.threads, [&](int64_t i) {
    const int64_t b = i / groups / a.kv_heads, head = i / groups % a.kv_heads, table = i % groups * SIDE_BY_SIDE;
    const int64_t count = a.tables - table < SIDE_BY_SIDE ? a.tables - table : SIDE_BY_SIDE;
    const Span view = span_of(a, b);
    uint16_t* codes = scratch<uint16_t>(1, SIDE_BY_SIDE * SEGMENT);
    for (int64_t s = 0; s < a.segments; s++) {
      const Part part = part_of(view, s);
      read_codes(a, kernels, b, head, table, count, s, part, codes);
      for (int64_t j = 0; j < count; j++) {
        sort_tokens(codes + j * SEGMENT, part, a.bits, offsets_of(a, b, head, table + j, s),
                    ids_of(a, b, head, table + j, s));
      }
    }
  });
}

int32_t code_of(const ks_tables_match_args& a, const int32_t* words, int64_t table) {
  int32_t code = 0;
  for (int64_t i = 0; i < a.bits; i++) {
    const int32_t column = a.columns[table * a.bits + i];
    code |= int32_t(uint32_t(words[column % a.words]) >> (column / a.words) & 1) << i;
  }
  return code;
}

// Bits `low` .. `high` - 1 of a word, of what lies in it.
uint64_t bits_in(int64_t low, int64_t high) {
  low = low < 0 ? 0 : low;
  if (low >= 64 || high <= low) return 0;
  return (high >= 64 ? ~uint64_t(0) : (uint64_t(1) << high) - 1) & ~((uint64_t(1) << low) - 1);
}

struct Bucket {
  const uint16_t* from;
  const uint16_t* to;
};

// The keys of a segment that are in two of the buckets, of the view.
int64_t match_segment(const Bucket* buckets, int64_t count, Part part, uint64_t* once, uint64_t* twice) {
  std::memset(once, 0, SEGMENT_WORDS * 8);
  std::memset(twice, 0, SEGMENT_WORDS * 8);
  for (int64_t l = 0; l < count; l++) {
    if (l + AHEAD < count) {
      const Bucket& next = buckets[l + AHEAD];
      for (const uint16_t* line = next.from; line < next.to; line += 32) __builtin_prefetch(line);
    }
    for (const uint16_t* id = buckets[l].from; id < buckets[l].to; id++) {
      const uint64_t bit = uint64_t(1) << (*id & 63), seen = once[*id >> 6];
      twice[*id >> 6] |= seen & bit;
      once[*id >> 6] = seen | bit;
    }
  }
  int64_t found = 0;
  for (int64_t w = 0; w < SEGMENT_WORDS; w++) {
    twice[w] &= bits_in(part.low - w * 64, part.high - w * 64);
    found += __builtin_popcountll(twice[w]);
  }
  return found;
}

void match(const ks_tables_match_args& a, int64_t b, int64_t h) {
  const int64_t head = h / (a.heads / a.kv_heads);
  const Span view = span_of(a, b);
  const int32_t* words = a.codes + (b * a.heads + h) * a.words;
  uint64_t* hits = a.hits + (b * a.heads + h) * a.segments * SEGMENT_WORDS;
  char* memory = static_cast<char*>(scratch(1, SEGMENT_WORDS * 8 + a.tables * int64_t(sizeof(Bucket) + 4)));
  uint64_t* once = reinterpret_cast<uint64_t*>(memory);
  Bucket* buckets = reinterpret_cast<Bucket*>(once + SEGMENT_WORDS);
  int32_t* codes = reinterpret_cast<int32_t*>(buckets + a.tables);
  for (int64_t l = 0; l < a.tables; l++) codes[l] = code_of(a, words, l);
  int64_t found = 0;
  for (int64_t s = 0; s < a.segments; s++) {
    const Part part = part_of(view, s);
    if (part.low >= part.high) continue;
    for (int64_t l = 0; l < a.tables; l++) __builtin_prefetch(offsets_of(a, b, head, l, s) + codes[l]);
    for (int64_t l = 0; l < a.tables; l++) {
      const int32_t* offsets = offsets_of(a, b, head, l, s) + codes[l];
      const uint16_t* ids = ids_of(a, b, head, l, s);
      buckets[l] = {ids + offsets[0], ids + offsets[1]};
    }
    found += match_segment(buckets, a.tables, part, once, hits + s * SEGMENT_WORDS);
  }
  a.counts[b * a.heads + h] = int32_t(found);
}

void list(const ks_tables_list_args& a, int64_t b, int64_t h) {
  const Span view = span_of(a, b);
  const uint64_t* hits = a.hits + (b * a.heads + h) * a.segments * SEGMENT_WORDS;
  int32_t* to = a.rows + (b * a.heads + h) * a.width;
  int32_t* const full = to + a.width;
  for (int64_t w = view.begin / 64; w < (view.end + 63) / 64 && view.begin < view.end; w++) {
    const int32_t row = int32_t(view.first + w * 64);
    for (uint64_t word = hits[w]; word && to < full; word &= word - 1) *to++ = row + __builtin_ctzll(word);
  }
}

}  // namespace

extern "C" {

KS_EXPORT int ks_tables_build(const ks_tables_build_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    require(a->bits >= 1 && a->bits <= 16, "bits must be 1 to 16");
    for (int64_t b = 0; b < a->batch; b++) {
      require(span_of(*a, b).end <= a->room && a->room <= a->segments * SEGMENT, "the view reaches past the tables");
    }
    build(*a, KS_TABLE(tables, isa));
  });
}

KS_EXPORT int ks_tables_match(const ks_tables_match_args* a) {
  return guarded(a, [&](Isa) {
    check(*a);
    require(a->heads % a->kv_heads == 0, "heads must be a multiple of kv_heads");
    parallel_for(a->batch * a->heads, a->threads, [&](int64_t i) { match(*a, i / a->heads, i % a->heads); });
  });
}

KS_EXPORT int ks_tables_list(const ks_tables_list_args* a) {
  return guarded(a, [&](Isa) {
    check(*a);
    parallel_for(a->batch * a->heads, a->threads, [&](int64_t i) { list(*a, i / a->heads, i % a->heads); });
  });
}
}

}  // namespace ks
