// Bucket tables: the tokens of each code of each table, so that a step reads only those that have the query's codes.
//
// Tokens lie in segments of SEGMENT, and in a segment a token is a number of 16 bits: those of table l, in the order of
// their codes and ascending in each, are ids[b, head, l, segment * SEGMENT ..]. The tokens of code c are those from
// offsets[b, head, l, segment, c] to offsets[.., c + 1].
#pragma once

#include "codes.h"

#define KS_TABLES_FIELDS                                                                   \
  uint16_t* ids;          /* [batch, kv_heads, tables, room] */                            \
  int64_t room;           /* tokens that a sequence may have */                            \
  int32_t* offsets;       /* [batch, kv_heads, tables, segments, 2 ** bits + 1] */         \
  int64_t segments;                                                                        \
  const int32_t* columns; /* [tables, bits]: the planes whose bits make a table's code */  \
  int64_t tables;                                                                          \
  int64_t bits;

extern "C" {

// Tables of the tokens of views, from their bits.
struct ks_tables_build_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_TABLES_FIELDS
  const int32_t* planes;
  int64_t planes_stride_0, planes_stride_head, planes_stride_entry;
};

// The tokens of views, of those that the tables hold, that have the query's code in two tables: a bit a token.
struct ks_tables_match_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_TABLES_FIELDS
  const int32_t* codes;  // [batch, heads, words]
  int64_t words;
  int64_t heads;
  uint64_t* hits;  // [batch, heads, segments * SEGMENT / 64]
  int32_t* counts;
};

// Their rows.
struct ks_tables_list_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  const uint64_t* hits;
  int64_t segments;
  int64_t heads;
  int32_t* rows;  // [batch, heads, width]
  int64_t width;
};
}

namespace ks {
namespace {

constexpr int64_t SEGMENT = 65536;
constexpr int64_t SEGMENT_WORDS = SEGMENT / 64;
constexpr int64_t SIDE_BY_SIDE = 4;  // tables whose bits share a cache line

}  // namespace

struct TablesKernels {
  // Codes of 128 tokens of an entry, whose planes begin at `planes`, in a table.
  void (*codes)(const int32_t* planes, const int32_t* columns, int64_t bits, uint16_t* to);
};

KS_DECLARE_TABLES(TablesKernels, tables)

}  // namespace ks
