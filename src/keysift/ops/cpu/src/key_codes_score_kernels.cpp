// Scores from codes, the factors of a draw, and which tokens it takes.
#include "codes_vec.h"
#include "key_codes.h"
#include "key_codes_products.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr float LN2 = 0.6931471805599453f;
constexpr int NEWTON = 40;   // steps in which a draw's factor is found, at most

// What a task keeps of a block of tokens.
struct Block {
  int32_t* product;  // [group up to a multiple of 4, BLOCK]
  float* size;       // [BLOCK]
  float* u;          // [group, BLOCK]
  int32_t* unit;     // [BLOCK]
  uint8_t* codes;    // [BLOCK, bytes]
};

KS_INLINE int64_t block_bytes(const ks_key_sample_args& a) {
  const int64_t group = a.heads / a.kv_heads;
  return BLOCK * (4 * (2 * group + 3 + 2) + bytes_of_code(a)) + 4096;
}

KS_INLINE Block block_of(const ks_key_sample_args& a, char* buffer) {
  Block x;
  const int64_t group = a.heads / a.kv_heads;
  x.product = reinterpret_cast<int32_t*>(buffer);
  x.size = reinterpret_cast<float*>(x.product + ceil_to(group, 4) * BLOCK);
  x.u = x.size + BLOCK;
  x.unit = reinterpret_cast<int32_t*>(x.u + group * BLOCK);
  x.codes = reinterpret_cast<uint8_t*>(x.unit + BLOCK);
  return x;
}

// Codes and sizes of the tokens of a block that are in the view; zeros for the others. Returns where the codes are.
KS_INLINE const uint8_t* read_block(
    const ks_key_sample_args& a, int64_t b, int64_t head, const Span& view, int64_t first, const Block& x
) {
  const int64_t bytes = bytes_of_code(a), low = most(view.begin, first), high = least(view.end, first + BLOCK);
  if (low == first && high == first + BLOCK && left_in_page(a, first) >= BLOCK) {
    widen(size_at(a, b, head, first), FP16, BLOCK, x.size);
    return code_at(a, b, head, first);
  }
  std::memset(x.codes, 0, size_t(BLOCK * bytes));
  std::memset(x.size, 0, BLOCK * 4);
  for (int64_t token = low; token < high;) {
    const int64_t n = least(high - token, left_in_page(a, token));
    std::memcpy(x.codes + (token - first) * bytes, code_at(a, b, head, token), size_t(n * bytes));
    widen(size_at(a, b, head, token), FP16, n, x.size + token - first);
    token += n;
  }
  return x.codes;
}

KS_INLINE f32v score_of(const Query& q, int64_t g, const Block& x, int64_t i) {
  const i32v whole = load_int(x.product + g * BLOCK + i) - set1_int(int32_t(q.missing[g]));
  return (to_floats(whole) * set1(q.slope[g]) - set1(q.shift[g])) * load(x.size + i);
}

// Room for the scores of a head's sampled tokens.
KS_INLINE int64_t pitch_of(const ks_key_sample_args& a) { return ceil_to(a.sample + 2 * a.row, BLOCK) + BLOCK; }

int64_t buffer_bytes(const ks_key_sample_args& a) {
  const int64_t known = a.stages & FACTORS ? (a.heads / a.kv_heads + 1) * pitch_of(a) * 4 : 0;
  return query_bytes(a) + ceil_to(block_bytes(a), 64) + known;
}

// ---- factors --------------------------------------------------------------------------------------------------------

// Scores of `held` tokens whose codes are in the block, behind the `count` that are known.
KS_INLINE void add_scores(const Query& q, const Block& x, int64_t held, float* known, int64_t pitch, int64_t count) {
  products(q, x.codes, held, x.product);
  for (int64_t g = 0; g < q.group; g++) {
    for (int64_t i = 0; i < held; i += W) store(known + g * pitch + count + i, score_of(q, g, x, i));
  }
}

// Scores of the sampled tokens, [group, pitch]; their number. See keysift.ops.key_codes.sampled.
KS_INLINE int64_t sampled(
    const ks_key_sample_args& a, int64_t b, int64_t head, const Query& q, const Block& x, float* known
) {
  const Span view = span_of(a, b);
  const int64_t row = a.row, bytes = q.bytes, first = view.begin / row, last = (view.end - 1) / row;
  const int64_t step = most(last - first, 0) / (a.sample / row - 1) + 1;
  int64_t count = 0, held = 0;
  for (int64_t run = first / step; run <= last / step; run++) {
    const int64_t scattered = int64_t(uint32_t(run) * 0x9E3779B1u >> 12);
    const int64_t token = (run * step + scattered % step) * row;
    for (int64_t t = most(token, view.begin); t < least(token + row, view.end); t++) {
      std::memcpy(x.codes + held * bytes, code_at(a, b, head, t), size_t(bytes));
      widen(size_at(a, b, head, t), FP16, 1, x.size + held);
      held++;
    }
    if (held + row <= BLOCK) continue;
    add_scores(q, x, held, known, pitch_of(a), count);
    count += held;
    held = 0;
  }
  add_scores(q, x, held, known, pitch_of(a), count);
  count += held;
  for (int64_t g = 0; g < q.group; g++) {
    for (int64_t i = count; i < ceil_to(count, W); i++) known[g * pitch_of(a) + i] = -__builtin_inff();
  }
  return count;
}

// Adds the softmax of a head's scores to `x`; what its logarithm is shifted by. Lanes after the last score are -inf.
KS_INLINE float add_softmax(const float* score, int64_t n, float* x) {
  f32v highest_score = set1(-ALL), sum_of = zero();
  for (int64_t i = 0; i < n; i += W) highest_score = most_of(highest_score, load(score + i));
  const float top = largest(highest_score);
  for (int64_t i = 0; i < n; i += W) {
    const f32v at = load(score + i);
    sum_of += at > set1(-ALL) ? exp2_of(at - set1(top)) : zero();
  }
  const float total = sum(sum_of) > 1e-30f ? sum(sum_of) : 1e-30f;
  for (int64_t i = 0; i < n; i += W) {
    const f32v at = load(score + i);
    const f32v share = most_of(exp2_of(at - set1(top)) / set1(total), set1(1e-30f));
    store(x + i, load(x + i) + (at > set1(-ALL) ? share : zero()));
  }
  return -top - __builtin_log2f(total);
}

// Log2 of the factor with which the probabilities min(1, f x) add up to the target: Newton's steps on a sum that is
// concave in the factor come from below, and the last is exact.
KS_INLINE float factor_of(const float* x, int64_t n, float target) {
  f32v all = zero();
  for (int64_t i = 0; i < n; i += W) all += load(x + i);
  float f = target / (sum(all) > 1e-30f ? sum(all) : 1e-30f), before = 0;
  for (int turn = 0; turn < NEWTON && f > before * 1.000001f; turn++) {
    before = f;
    f32v rest = zero(), certain = zero();
    for (int64_t i = 0; i < n; i += W) {
      const f32v at = load(x + i), one = set1(1.0f);
      const i32v sure = at * set1(f) >= one;
      rest += sure ? zero() : at;
      certain += sure ? one : zero();
    }
    const float taken = sum(certain), left = sum(rest);
    f = (target > taken ? target - taken : 0) / (left > 1e-30f ? left : 1e-30f);
    f = f < 1e30f ? f : 1e30f;
  }
  f = f > before ? f : before;
  return __builtin_log2f(f > 1e-30f ? f : 1e-30f);
}

// The factors of the heads of a group.
void factors(const ks_key_sample_args& a, int64_t b, int64_t head, void* buffer) {
  char* free = static_cast<char*>(buffer);
  const Query q = query_of(a, b, head, free);
  const Block block = block_of(a, free += query_bytes(a));
  const int64_t pitch = pitch_of(a);
  float* known = reinterpret_cast<float*>(free + ceil_to(block_bytes(a), 64));
  float* x = known + q.group * pitch;
  float* log_c = a.log_c + b * a.heads + head * q.group;
  const int64_t length = most(a.length[b], 0);
  int64_t wanted = int64_t(a.quota_share * float(length)) + a.quota_keys;
  wanted = least(most(wanted, 1), length);
  if (wanted >= length) {
    for (int64_t g = 0; g < q.group; g++) log_c[g] = ALL;
    return;
  }
  const int64_t n = sampled(a, b, head, q, block, known);
  const float target = float(double(wanted) / double(length) * double(n));
  const bool shared = a.lists == a.kv_heads;
  for (int64_t g = 0; g < q.group; g++) {
    if (!shared || g == 0) std::memset(x, 0, size_t(ceil_to(n, W)) * 4);
    log_c[g] = add_softmax(known + g * pitch, n, x);
    if (!shared) log_c[g] += factor_of(x, n, target);
  }
  if (!shared) return;
  const float log_f = factor_of(x, n, target);
  for (int64_t g = 0; g < q.group; g++) log_c[g] += log_f;
}

// ---- draws ----------------------------------------------------------------------------------------------------------

// Probabilities of the tokens of a block in units of 1 / ONE; the sum over the heads from `g` to `g_end`.
KS_INLINE void units_of(const Block& x, int64_t g, int64_t g_end, int64_t low, int64_t high) {
  for (int64_t i = 0; i < BLOCK; i += W) {
    f32v u = load(x.u + g * BLOCK + i);
    for (int64_t h = g + 1; h < g_end; h++) u += load(x.u + h * BLOCK + i);
    const i32v unit = cut(least_of(u, set1(1.0f)) * set1(float(ONE)));
    store_int(x.unit + i, unit > set1_int(1) ? unit : set1_int(1));
  }
  for (int64_t i = 0; i < low; i++) x.unit[i] = 0;
  for (int64_t i = high; i < BLOCK; i++) x.unit[i] = 0;
}

KS_INLINE int32_t sum_of_units(const int32_t* unit) {
  i32v sum = {};
  for (int64_t i = 0; i < 16; i += W) sum += load_int(unit + i);
  int32_t lane[W], total = 0;
  store_int(lane, sum);
  for (int i = 0; i < W; i++) total += lane[i];
  return total;
}

// Takes from a block the tokens at which the running sum of the probabilities passes a whole number, or each by a
// number of its own; returns the sum of all.
KS_INLINE int32_t take(
    const int32_t* unit, uint32_t own, bool independent, int32_t first, int32_t* token, int32_t* taken, int64_t* count
) {
  int32_t total = 0;
  int64_t n = *count;
  const int32_t start = int32_t(own >> (32 - ONE_BITS));
  for (int64_t i = 0; i < BLOCK; i += 16) {
    const int32_t here = sum_of_units(unit + i);
    if (independent) {
      for (int64_t j = i; j < i + 16; j++) {
        token[n] = first + int32_t(j), taken[n] = unit[j];
        n += int32_t(absorb(own, j) >> (32 - ONE_BITS)) < unit[j];
      }
    } else if (((total + start) & (ONE - 1)) + here >= ONE) {
      int32_t running = total + start;
      for (int64_t j = i; j < i + 16; j++) {
        running += unit[j];
        token[n] = first + int32_t(j), taken[n] = unit[j];
        n += (running & (ONE - 1)) < unit[j];
      }
    }
    total += here;
  }
  *count = n;
  return total;
}

// What the lists of a KV head take of some blocks.
void draw(const KeyDrawTask& t) {
  const ks_key_sample_args& a = *t.a;
  char* free = static_cast<char*>(t.buffer);
  const Query q = query_of(a, t.b, t.head, free);
  const Block x = block_of(a, free + query_bytes(a));
  const Span view = span_of(a, t.b);
  const int64_t lists = a.lists / a.kv_heads, room = PART_BLOCKS * BLOCK + 1;
  for (int64_t c = 0; c < lists; c++) t.taken.count[c] = t.taken.total[c] = 0, t.taken.variance[c] = 0;
  for (int64_t block = t.block; block < t.block_end; block++) {
    const int64_t first = block * BLOCK;
    const int64_t low = most(view.begin - first, 0), high = least(view.end - first, BLOCK);
    if (low >= high) continue;
    products(q, read_block(a, t.b, t.head, view, first, x), BLOCK, x.product);
    for (int64_t g = 0; g < q.group; g++) {
      for (int64_t i = 0; i < BLOCK; i += W) {
        store(x.u + g * BLOCK + i, exp2_of(score_of(q, g, x, i) + set1(q.log_c[g])));
      }
    }
    for (int64_t c = 0; c < lists; c++) {
      units_of(x, lists == 1 ? 0 : c, lists == 1 ? q.group : c + 1, low, high);
      const uint32_t of_query = absorb(absorb(a.state, a.first + t.head * lists + c), a.positions[t.b]);
      const int32_t total = take(
          x.unit, absorb(of_query, block), a.independent != 0, int32_t(first), t.taken.token + c * room,
          t.taken.unit + c * room, t.taken.count + c
      );
      const double fraction = double(total & (ONE - 1)) / ONE;
      t.taken.total[c] += total;
      t.taken.variance[c] += a.independent ? double(total) / ONE : fraction * (1 - fraction);
    }
  }
}

// Scores of the tokens of a block; -inf outside of the view.
void estimate(const ks_key_sample_args& a, int64_t b, int64_t head, int64_t block, void* buffer) {
  char* free = static_cast<char*>(buffer);
  const Query q = query_of(a, b, head, free);
  const Block x = block_of(a, free + query_bytes(a));
  const Span view = span_of(a, b);
  const int64_t first = block * BLOCK, low = most(view.begin, first), high = least(view.end, first + BLOCK);
  const int64_t n = least(BLOCK, a.bound - first);
  if (low < high) products(q, read_block(a, b, head, view, first, x), BLOCK, x.product);
  for (int64_t g = 0; g < q.group; g++) {
    float* to = a.scores + (b * a.heads + head * q.group + g) * a.bound + first;
    if (low < high) {
      for (int64_t i = 0; i < BLOCK; i += W) store(x.u + i, score_of(q, g, x, i) * set1(LN2));
    }
    for (int64_t i = 0; i < n; i++) to[i] = first + i >= low && first + i < high ? x.u[i] : -__builtin_inff();
  }
}

void hamming(const ks_key_hamming_args& a, int64_t b, int64_t head, int64_t block) {
  const Span view = span_of(a, b);
  const int64_t group = a.heads / a.kv_heads, bytes = bytes_of_code(a);
  const int64_t stop = least(a.bound, (block + 1) * BLOCK);
  for (int64_t t = block * BLOCK; t < stop; t++) {
    int16_t* to = a.out + ((b * a.kv_heads + head) * a.bound + t) * group;
    const bool inside = t >= view.begin && t < view.end;
    const uint8_t* code = inside ? code_at(a, b, head, t) : nullptr;
    for (int64_t g = 0; g < group; g++) {
      const uint8_t* query = a.q_codes + (b * a.heads + head * group + g) * bytes;
      int64_t differ = 0, j = 0;
      for (; inside && j + 8 <= bytes; j += 8) {
        uint64_t x, y;
        std::memcpy(&x, code + j, 8);
        std::memcpy(&y, query + j, 8);
        differ += __builtin_popcountll(x ^ y);
      }
      for (; inside && j < bytes; j++) differ += __builtin_popcount(uint32_t(code[j] ^ query[j]));
      to[g] = int16_t(differ);
    }
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(KeyScoreKernels, key_codes_score) = {KS_ISA::buffer_bytes, KS_ISA::factors, KS_ISA::draw,
                                                     KS_ISA::estimate, KS_ISA::hamming};

}  // namespace ks
