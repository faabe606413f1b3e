// Codes of a few bits a coordinate, and draws by them: see keysift/ops/key_codes.py for what they are.
#pragma once

#include "codes_view.h"
#include "dispatch.h"

// Side data of tokens: codes uint8 [pages or batch, kv_heads, tokens, bytes], sizes fp16 likewise. A page or sequence
// is in one piece; the next begins so many heads later as the pitch says.
#define KS_KEY_CODES_FIELDS \
  uint8_t* codes;           \
  uint16_t* sizes;          \
  int64_t codes_pitch;      \
  int64_t sizes_pitch;      \
  int64_t tokens;           \
  int64_t planes;           \
  int64_t code_dim;

extern "C" {

// Codes of rows done .. end - 1 of each view.
struct ks_key_hash_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_KEY_CODES_FIELDS
  const float* mean;  // [batch, kv_heads, dim]
  const uint16_t* w;  // bf16 [kv_heads, dim, dim]
  const int64_t* done;
  int64_t most;
  float step;
  float reserved_2;
};

// The stages of a draw, or of an estimate, each from what the one before it wrote.
struct ks_key_sample_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_KEY_CODES_FIELDS
  const void* q;  // [batch, heads, dim]
  int64_t q_stride_b, q_stride_head;
  const uint16_t* w;
  int64_t heads;
  int8_t* weights;  // [batch, heads, code_dim]
  float* line;      // [batch, heads, 2]
  float* log_c;     // [batch, heads]
  int64_t lists;    // kv_heads or heads
  int64_t first;    // what random numbers call the first of them
  const int64_t* positions;
  int32_t* rows;      // [batch, lists, most_rows]
  float* log_w;       // likewise
  int32_t* counts;    // [batch, lists]
  float* expected;    // [batch, lists]
  uint8_t* overflow;  // [batch, lists]
  int64_t most_rows;
  int64_t quota_keys;
  float* scores;  // [batch, heads, bound], of an estimate
  int64_t row;    // tokens of a run that is sampled
  int64_t sample;  // tokens that tell the factors, at most
  float quota_share;
  float scale;  // times step * log2(e)
  uint32_t state;
  int32_t independent;
  int32_t stages;  // of Stage
  int32_t q_dtype;
};

// Bits in which codes differ.
struct ks_key_hamming_args {
  KS_ARGS_HEAD
  KS_VIEW_FIELDS
  KS_KEY_CODES_FIELDS
  const uint8_t* q_codes;  // [batch, heads, bytes]
  int64_t heads;
  int16_t* out;  // [batch, kv_heads, bound, group]
};
}

namespace ks {

enum Stage : int32_t { PROBE = 1, FACTORS = 2, DRAW = 4, ESTIMATE = 8 };

namespace {

constexpr int64_t HASH_TOKENS = 96;    // that are rotated together
constexpr int64_t BLOCK = 256;         // tokens that share a uniform number
constexpr int64_t PART_BLOCKS = 16;    // blocks of a task that draws
constexpr int32_t ONE_BITS = 22;
constexpr int32_t ONE = 1 << ONE_BITS;
constexpr float ALL = 1e30f;

template <class Args>
inline int64_t bytes_of_code(const Args& a) {
  return a.code_dim * a.planes / 8;
}

// Which entry of side data is a token's; all up to the end of its page follow.
template <class Args>
inline int64_t side_of(const Args& a, int64_t b, int64_t head, int64_t token, int64_t pitch) {
  if (!a.table) return (b * pitch + head) * a.tokens + token;
  return (int64_t(a.table[b * a.table_stride + token / a.page]) * pitch + head) * a.page + token % a.page;
}

template <class Args>
inline uint8_t* code_at(const Args& a, int64_t b, int64_t head, int64_t token) {
  return a.codes + side_of(a, b, head, token, a.codes_pitch) * bytes_of_code(a);
}

template <class Args>
inline uint16_t* size_at(const Args& a, int64_t b, int64_t head, int64_t token) {
  return a.sizes + side_of(a, b, head, token, a.sizes_pitch);
}

// Tokens from `token` to the end of its page.
template <class Args>
inline int64_t left_in_page(const Args& a, int64_t token) {
  return a.table ? a.page - token % a.page : int64_t(1) << 40;
}

// The random numbers of keysift.ops.random.
inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x21F0AAADu;
  x = (x ^ x >> 15) * 0x735A2D97u;
  return x ^ x >> 15;
}

inline uint32_t absorb(uint32_t state, int64_t word) {
  state = mix(state + uint32_t(uint64_t(word)) + 0x9E3779B9u);
  return mix(state ^ uint32_t(uint64_t(word) >> 32));
}

}  // namespace

struct KeyHashTask {
  const ks_key_hash_args* a;
  int64_t b, head, low, high;  // tokens, at most HASH_TOKENS
  float* buffer;               // hash_buffer floats
};

// What a task took of the tokens of some blocks, for the lists of a KV head.
struct Taken {
  int32_t* token;  // [lists of the head, PART_BLOCKS * BLOCK]
  int32_t* unit;
  int64_t* count;  // [lists of the head]
  int64_t* total;  // of the probabilities, in units
  double* variance;
};

struct KeyDrawTask {
  const ks_key_sample_args* a;
  int64_t b, head, block, block_end;
  Taken taken;
  void* buffer;  // draw_buffer bytes
};

struct KeyCodesKernels {
  int64_t (*hash_buffer)(int64_t dim, int64_t code_dim);  // floats
  void (*hash)(const KeyHashTask& task);
  void (*probe)(const ks_key_sample_args& a, int64_t b, int64_t head, float* buffer);
};

struct KeyScoreKernels {
  int64_t (*buffer)(const ks_key_sample_args& a);  // bytes
  void (*factors)(const ks_key_sample_args& a, int64_t b, int64_t head, void* buffer);
  void (*draw)(const KeyDrawTask& task);
  void (*estimate)(const ks_key_sample_args& a, int64_t b, int64_t head, int64_t block, void* buffer);
  void (*hamming)(const ks_key_hamming_args& a, int64_t b, int64_t head, int64_t block);
};

KS_DECLARE_TABLES(KeyCodesKernels, key_codes)
KS_DECLARE_TABLES(KeyScoreKernels, key_codes_score)

}  // namespace ks
