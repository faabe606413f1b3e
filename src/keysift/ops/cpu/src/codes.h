// Sign-bit codes of keys in bit planes: see keysift/ops/codes.py for what they are and how they lie.
#pragma once

#include "codes_view.h"
#include "dispatch.h"

extern "C" {

// Bits of the tokens of rows done .. end - 1 of each view.
struct ks_hash_planes_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  int32_t* planes;
  int64_t planes_stride_0, planes_stride_head, planes_stride_entry;
  const float* mean;       // [batch, kv_heads, dim]
  const float* threshold;  // [batch, kv_heads, columns], or null: keys are centred, and rounded to their dtype
  const void* w;           // [kv_heads or 1, columns, dim]
  int64_t w_stride_head;
  int64_t columns;
  const int64_t* done;  // [batch]
  int64_t most;
  int32_t w_dtype;
  int32_t reserved_2;
};

// Codes [batch, heads, tables] of queries.
struct ks_hash_query_args {
  KS_ARGS_HEAD
  const void* q;  // [batch, heads, dim]
  int64_t q_stride_b, q_stride_head;
  const void* w;  // [kv_heads, tables * bits, dim]
  int64_t w_stride_head;
  int64_t batch, heads, kv_heads, dim, bits, tables;
  int32_t* codes;
  int32_t q_dtype, w_dtype;
};

// The keys of a view that have the query's code in two tables: a bit a token.
struct ks_match_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  const int32_t* planes;
  int64_t planes_stride_0, planes_stride_head, planes_stride_entry;
  const int32_t* codes;  // [batch, heads, tables], or of a pool [batch, heads, words]
  int64_t heads;
  int64_t bits;
  int64_t tables;
  int64_t words;         // of a pool; 0 where tables have bits of their own
  const int32_t* masks;  // of a pool: the bits of a word that each of its tables takes
  int64_t masks_count;
  int32_t* hits;  // [batch, heads, entries * 4]
  int64_t entries;
  int32_t* counts;  // [batch, heads]
};

// The rows of the bits that are set.
struct ks_list_hits_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  const int32_t* hits;
  int64_t heads;
  int64_t entries;
  int32_t* rows;  // [batch, heads, width]
  int64_t width;
  const int32_t* after;  // [batch, heads]: entries of each list that are in use already, or null
};
}

namespace ks {
namespace {

constexpr int64_t WORDS = 4;            // of a plane in an entry
constexpr int64_t UNIT = 32 * WORDS;    // tokens of an entry
constexpr int64_t HALF = UNIT / 2;      // tokens that are hashed together
constexpr int64_t MATCH_ENTRIES = 32;   // of a task that matches
constexpr int64_t TILE_COLUMNS = 60;    // packed directions are a multiple of so many

// Entries of a page, or of nothing where rows lie in one piece.
template <class Args>
inline int64_t entries_a_page(const Args& a) {
  return (a.page + UNIT - 1) / UNIT;
}

// The entry of a sequence that holds a token.
template <class Args>
inline int64_t entry_of(const Args& a, int64_t token) {
  return a.table ? token / a.page * entries_a_page(a) + token % a.page / UNIT : token / UNIT;
}

struct Entry {
  int64_t token;  // its first
  int64_t stop;   // one past its last
  int64_t at;     // elements from the start of the planes
};

template <class Args>
inline Entry entry_at(const Args& a, int64_t b, int64_t head, int64_t entry) {
  int64_t token = entry * UNIT, stop = token + UNIT, page = b, slot = entry;
  if (a.table) {
    const int64_t per = entries_a_page(a), of = entry / per;
    slot = entry % per;
    token = of * a.page + slot * UNIT;
    stop = (of + 1) * a.page < token + UNIT ? (of + 1) * a.page : token + UNIT;
    page = a.table[b * a.table_stride + of];
  }
  return {token, stop, page * a.planes_stride_0 + head * a.planes_stride_head + slot * a.planes_stride_entry};
}

// A word whose bits low .. high - 1 are set, of what lies in 0 .. 31.
inline uint32_t bits_between(int64_t low, int64_t high) {
  low = low < 0 ? 0 : low > 32 ? 32 : low;
  high = high < 0 ? 0 : high > 32 ? 32 : high;
  return uint32_t(((uint64_t(1) << high) - 1) & ~((uint64_t(1) << low) - 1));
}

}  // namespace

// What keys and directions are multiplied as. Numbers of 16 bits lie in pairs.
enum Packing : int32_t { AS_FP32 = 0, AS_INT16 = 1, AS_BF16 = 2 };

// Directions of all heads, packed: [heads, columns up to a multiple of TILE_COLUMNS, steps] of 4 bytes.
struct Directions {
  int32_t packing;
  int64_t steps;
  int64_t columns;
  int32_t* packed;
  float* scale;  // of each column, a power of two
};

struct HashTask {
  const ks_hash_planes_args* a;
  const Directions* w;
  int64_t b, head, entry;
  int64_t low, high;  // new tokens
  void* buffer;       // of hash_buffer bytes
};

struct HashRowsTask {
  const ks_hash_planes_args* a;
  int64_t b, head, low, high, column, column_end;
  float* buffer;  // (tokens + 1) * padded dim
};

struct MatchTask {
  const ks_match_args* a;
  int64_t b, head, entry, entry_end;
  int32_t* counts;  // of the heads of the group
  void* buffer;     // of match_buffer bytes
};

struct CodesKernels {
  int32_t (*packing)(int32_t k_dtype);
  void (*pack)(const ks_hash_planes_args& a, const Directions& w, int64_t head, float* buffer);
  int64_t (*hash_buffer)(const ks_hash_planes_args& a, const Directions& w);
  void (*hash)(const HashTask& task);
  void (*hash_rows)(const HashRowsTask& task);
  void (*hash_query)(const ks_hash_query_args& a, int64_t head, int64_t table, int64_t table_end, float* buffer);
};

struct MatchKernels {
  int64_t (*match_buffer)(const ks_match_args& a);
  void (*match)(const MatchTask& task);
};

KS_DECLARE_TABLES(CodesKernels, codes)
KS_DECLARE_TABLES(MatchKernels, codes_match)

}  // namespace ks
