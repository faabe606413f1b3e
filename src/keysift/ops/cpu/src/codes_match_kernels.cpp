// Matching of codes: a XOR and an OR compare as many keys as a vector has bits with a query, for all heads of a group.
#include "codes.h"
#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int TOGETHER = W / int(WORDS);  // tables, or words of a pool, side by side in a vector
constexpr int MAX_TABLES = 32, MAX_SOURCES = 16;

// Keys seen in one table or more, and in two or more.
template <int G>
struct Seen {
  i32v once[G], twice[G];
};

// The bits of the query's codes, a byte for each lane, so that those of all tables stay in the nearest cache.
KS_INLINE i32v spread(const int8_t* bits) {
#if KS_WIDTH == 16
  return (i32v)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bits));
#elif KS_WIDTH == 8
  return (i32v)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bits));
#else
  int32_t all;  // one table: its four lanes are alike
  std::memcpy(&all, bits, 4);
  return set1_int(all);
#endif
}

// Bytes of the tables `first` .. of a vector; anything beyond the last.
KS_INLINE void put_query(const int32_t* codes, int64_t first, int64_t count, int64_t bit, int8_t* to) {
  for (int t = 0; t < TOGETHER; t++) {
    const int64_t at = first + t < count ? first + t : count - 1;
    const int8_t all = int8_t(-int32_t(uint32_t(codes[at]) >> bit & 1));
    for (int i = 0; i < WORDS; i++) to[t * WORDS + i] = all;
  }
}

// All bits set where there is no table or word.
KS_INLINE i32v beyond(int64_t first, int64_t count) {
  int32_t lane[W];
  for (int i = 0; i < W; i++) lane[i] = first + i / WORDS < count ? 0 : -1;
  return load_int(lane);
}

// A plane of the tables of a vector; 0 beyond the last, for the memory may end there.
KS_INLINE i32v plane_of(const int32_t* from, int64_t tables) {
  if (tables >= TOGETHER) return load_int(from);
  int32_t lane[W] = {};
  std::memcpy(lane, from, size_t(tables * WORDS) * 4);
  return load_int(lane);
}

// `to` is what is read next, line by line as it lies: `part` of `parts` of it.
KS_INLINE void prefetch_part(const int32_t* to, int64_t bytes, int64_t part, int64_t parts) {
  const int64_t lines = (bytes + 63) / 64;
  for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; i++) {
    prefetch(reinterpret_cast<const char*>(to) + i * 64);
  }
}

// An entry of tables that have bits of their own; `next` is the one after it.
template <int G>
KS_INLINE void own_tables(
    const ks_match_args& a, const int32_t* planes, const int32_t* next, const int8_t* query, Seen<G>& seen
) {
  const int64_t vectors = (a.tables + TOGETHER - 1) / TOGETHER, stride = a.tables * WORDS;
  for (int64_t i = 0; i < vectors; i++, planes += W, query += a.bits * G * W) {
    const int64_t rest = a.tables - i * TOGETHER;
    prefetch_part(next, a.bits * stride * 4, i, vectors);
    i32v differs[G];
    for (int g = 0; g < G; g++) differs[g] = i32v{};
    if (rest >= TOGETHER) {
      for (int64_t b = 0; b < a.bits; b++) {
        const i32v plane = load_int(planes + b * stride);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) differs[g] |= plane ^ spread(query + (b * G + g) * W);
      }
    } else {
      for (int g = 0; g < G; g++) differs[g] = beyond(i * TOGETHER, a.tables);
      for (int64_t b = 0; b < a.bits; b++) {
        const i32v plane = plane_of(planes + b * stride, rest);
        for (int g = 0; g < G; g++) differs[g] |= plane ^ spread(query + (b * G + g) * W);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      seen.twice[g] |= seen.once[g] & ~differs[g];
      seen.once[g] |= ~differs[g];
    }
  }
}

// Which of a word's 32 differences a table looks at, as bytes from the first: of the pairs, 0 .. 15, and of pairs'
// first bits, 16 .. 31. All tables look at equally many.
struct PoolTables {
  int64_t count, last;  // only the first `last` words have the last table
  int16_t at[MAX_TABLES][MAX_SOURCES];
};

KS_INLINE PoolTables pool_tables(const ks_match_args& a) {
  PoolTables p;
  p.count = a.masks_count;
  p.last = a.tables - (a.masks_count - 1) * a.words;
  for (int64_t t = 0; t < p.count; t++) {
    int n = 0;
    for (int i = 0; i < 16; i++) {
      const uint32_t both = uint32_t(a.masks[t]) >> (2 * i) & 3;
      if (both) p.at[t][n++] = int16_t((both == 3 ? i : 16 + i) * W * 4);
    }
    while (n < MAX_SOURCES) p.at[t][n] = p.at[t][n - 1], n++;  // once more does not matter
  }
  return p;
}

KS_INLINE i32v source_at(const i32v* sources, int16_t at) {
  i32v v;
  std::memcpy(&v, reinterpret_cast<const char*>(sources) + at, sizeof v);
  return v;
}

// An entry of tables that share the bits of a pool, some words of it after the other; each looks at SOURCES.
template <int G, int SOURCES>
KS_INLINE void pool_entry(
    const ks_match_args& a, const PoolTables& p, const int32_t* planes, const int32_t* next, const int8_t* query,
    Seen<G>& seen
) {
  const int64_t vectors = (a.words + TOGETHER - 1) / TOGETHER;
  for (int64_t j = 0; j < vectors; j++, planes += W, query += 32 * G * W) {
    prefetch_part(next, 32 * a.words * WORDS * 4, j, vectors);
    const i32v without = beyond(j * TOGETHER, a.words), without_last = beyond(j * TOGETHER, p.last);
    i32v plane[32], source[32];
    for (int bit = 0; bit < 32; bit++) {
      plane[bit] = plane_of(planes + bit * a.words * WORDS, a.words - j * TOGETHER);
    }
    for (int g = 0; g < G; g++) {
      const int8_t* of = query + g * 32 * W;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const i32v first = plane[2 * i] ^ spread(of + 2 * i * W);
        source[i] = first | (plane[2 * i + 1] ^ spread(of + (2 * i + 1) * W));
        source[16 + i] = first;
      }
      i32v once = seen.once[g], twice = seen.twice[g];
      for (int64_t t = 0; t < p.count; t++) {
        i32v differs = t + 1 == p.count ? without | without_last : without;
#pragma GCC unroll 16
        for (int i = 0; i < SOURCES; i++) differs |= source_at(source, p.at[t][i]);
        twice |= once & ~differs;
        once |= ~differs;
      }
      seen.once[g] = once, seen.twice[g] = twice;
    }
  }
}

template <int G>
KS_INLINE void pool_tables_of(
    const ks_match_args& a, const PoolTables& p, const int32_t* planes, const int32_t* next, const int8_t* query,
    Seen<G>& seen
) {
  if (a.bits > 10) return pool_entry<G, MAX_SOURCES>(a, p, planes, next, query, seen);
  if (a.bits > 8) return pool_entry<G, 5>(a, p, planes, next, query, seen);
  if (a.bits > 6) return pool_entry<G, 4>(a, p, planes, next, query, seen);
  pool_entry<G, 3>(a, p, planes, next, query, seen);
}

// What the tables of a vector say together, of the tokens in the view.
template <int G>
KS_INLINE void finish(
    const MatchTask& t, int64_t e, const Span& view, int64_t head, int64_t heads, const Seen<G>& seen
) {
  const ks_match_args& a = *t.a;
  const Entry entry = entry_at(a, t.b, t.head, e);
  for (int g = 0; g < heads; g++) {
    uint32_t once[W], twice[W];
    std::memcpy(once, &seen.once[g], sizeof once);
    std::memcpy(twice, &seen.twice[g], sizeof twice);
    const int64_t h = t.head * (a.heads / a.kv_heads) + head + g;
    int32_t* to = a.hits + ((t.b * a.heads + h) * a.entries + e) * WORDS;
    for (int word = 0; word < WORDS; word++) {
      uint32_t one = 0, two = 0;
      for (int i = word; i < W; i += WORDS) {
        two |= twice[i] | (one & once[i]);
        one |= once[i];
      }
      const int64_t token = entry.token + word * 32;
      two &= bits_between(view.begin - token, least(view.end, entry.stop) - token);
      to[word] = int32_t(two);
      t.counts[head + g] += __builtin_popcount(two);
    }
  }
}

template <int G>
void match_heads(const MatchTask& t, int64_t head, int64_t heads, const int64_t* at) {
  const ks_match_args& a = *t.a;
  const int64_t group = a.heads / a.kv_heads, per = a.words ? a.words : a.tables, bits = a.words ? 32 : a.bits;
  int8_t* query = static_cast<int8_t*>(t.buffer);
  for (int g = 0; g < G; g++) {
    const int32_t* codes = a.codes + (t.b * a.heads + t.head * group + head + (g < heads ? g : 0)) * per;
    for (int64_t i = 0; i * TOGETHER < per; i++) {
      for (int64_t b = 0; b < bits; b++) {  // of a pool, a head's bits lie side by side
        const int64_t slot = a.words ? (i * G + g) * 32 + b : (i * bits + b) * G + g;
        put_query(codes, i * TOGETHER, per, b, query + slot * W);
      }
    }
  }
  const PoolTables tables = a.words ? pool_tables(a) : PoolTables{};
  const Span view = span_of(a, t.b);
  for (int64_t e = t.entry; e < t.entry_end; e++) {
    const int32_t* planes = a.planes + at[e - t.entry];
    const int32_t* next = e + 1 < t.entry_end ? a.planes + at[e + 1 - t.entry] : planes;
    Seen<G> seen = {};
    if (a.words) {
      pool_tables_of<G>(a, tables, planes, next, query, seen);
    } else {
      own_tables<G>(a, planes, next, query, seen);
    }
    finish<G>(t, e, view, head, heads, seen);
  }
}

int64_t match_buffer(const ks_match_args& a) {
  const int64_t per = a.words ? a.words : a.tables, bits = a.words ? 32 : a.bits;
  return (per + TOGETHER - 1) / TOGETHER * bits * 4 * W;
}

// The entries of a task for the heads of a group, four at a time.
void match(const MatchTask& t) {
  const int64_t group = t.a->heads / t.a->kv_heads;
  int64_t at[MATCH_ENTRIES];
  for (int64_t e = t.entry; e < t.entry_end; e++) at[e - t.entry] = entry_at(*t.a, t.b, t.head, e).at;
  for (int64_t g = 0; g < group;) {
    const int64_t rest = group - g;
    if (rest == 1) match_heads<1>(t, g, 1, at), g += 1;
    else if (rest == 2) match_heads<2>(t, g, 2, at), g += 2;
    else match_heads<4>(t, g, least(rest, 4), at), g += 4;
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(MatchKernels, codes_match) = {KS_ISA::match_buffer, KS_ISA::match};

}  // namespace ks
