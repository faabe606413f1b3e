// Codes of a few bits a coordinate: how hashing and drawing are shared out, and how lists are closed up.
#include "key_codes.h"

#include <cmath>
#include <vector>

#include "pool.h"

namespace ks {
namespace {

constexpr int64_t THINNING = (int64_t(1) << 31) - 1;
constexpr int64_t MAX_BYTES = 512;  // of a code

template <class Args>
void check(const Args& a) {
  require(a.batch >= 0 && a.kv_heads >= 1 && a.dim >= 1, "batch, kv_heads, dim: out of range");
  require(!a.table || a.page >= 1, "a table needs a page");
  require(a.start && a.length, "start and length are needed");
  require(a.planes == 1 || a.planes == 2 || a.planes == 4 || a.planes == 8, "planes must be 1, 2, 4 or 8");
  require(a.code_dim >= a.dim && a.code_dim % 16 == 0 && a.code_dim <= 4096, "code_dim: out of range");
  require(bytes_of_code(a) <= MAX_BYTES || a.planes == 8, "codes are too long");
}

void hash(const ks_key_hash_args& a, const KeyCodesKernels& kernels) {
  struct Part {
    int64_t b, low, high;
  };
  std::vector<Part> parts;
  for (int64_t b = 0; b < a.batch; b++) {
    const Span view = span_of(a, b);
    const int64_t low = a.done[b] - view.first;
    const int64_t high = view.end < low + a.most ? view.end : low + a.most;
    for (int64_t t = low; t < high; t += HASH_TOKENS) {
      parts.push_back({b, t, t + HASH_TOKENS < high ? t + HASH_TOKENS : high});
    }
  }
  const int64_t floats = kernels.hash_buffer(a.dim, a.code_dim);
  parallel_for(int64_t(parts.size()) * a.kv_heads, a.threads, [&](int64_t i) {
    const Part& part = parts[size_t(i / a.kv_heads)];
    kernels.hash({&a, part.b, i % a.kv_heads, part.low, part.high, scratch<float>(1, floats)});
  });
}

// What probabilities are multiplied with, in units of 2 ** -32; see keysift.ops.key_codes.thinning.
int64_t thinning(double total, double variance, int64_t length, int64_t most_rows, float* expected) {
  double likely = total + 6 * std::sqrt(variance) + 1;
  likely = likely < double(length) ? likely : double(length);
  double share = 1;
  if (likely > double(most_rows)) share = (most_rows > 1 ? double(most_rows) - 1 : 0) / likely;
  *expected = float(total * share);
  const int64_t factor = int64_t(std::floor(share * 4294967296.0));
  return factor > 1 ? factor : 1;
}

struct List {
  const ks_key_sample_args* a;
  int64_t b, list, parts;
  const Taken* taken;  // of the first part; the others follow
};

// One list: what the parts took, one after the other, at the places that a thinning leaves them.
void close_up(const List& x, int64_t index) {
  const ks_key_sample_args& a = *x.a;
  const int64_t at = x.b * a.lists + x.list, room = PART_BLOCKS * BLOCK + 1;
  double variance = 0;
  int64_t total = 0, count = 0;
  for (int64_t p = 0; p < x.parts; p++) {
    total += x.taken[p].total[index];
    variance += x.taken[p].variance[index];
  }
  const int64_t length = a.length[x.b] > 0 ? a.length[x.b] : 0;
  const int64_t factor = thinning(double(total) / ONE, variance, length, a.most_rows, a.expected + at);
  const int64_t start = absorb(absorb(absorb(a.state, a.first + x.list), a.positions[x.b]), THINNING);
  const float less = std::log(float(double(factor) * std::ldexp(1.0, -32)));
  const int32_t first = int32_t(span_of(a, x.b).first);
  for (int64_t p = 0; p < x.parts; p++) {
    const Taken& taken = x.taken[p];
    const int32_t* token = taken.token + index * room;
    const int32_t* unit = taken.unit + index * room;
    for (int64_t i = 0; i < taken.count[index]; i++, count++) {
      const int64_t place = count * factor + start, to = place >> 32;
      if ((place + factor) >> 32 == to || to >= a.most_rows) continue;
      a.rows[at * a.most_rows + to] = first + token[i];
      a.log_w[at * a.most_rows + to] = -std::log(float(unit[i] > 1 ? unit[i] : 1) / ONE) - less;
    }
  }
  const int64_t found = (count * factor + start) >> 32;
  a.counts[at] = int32_t(found < a.most_rows ? found : a.most_rows);
  a.overflow[at] = found > a.most_rows;
}

void draw(const ks_key_sample_args& a, const KeyScoreKernels& kernels) {
  const int64_t lists = a.lists / a.kv_heads, blocks = (a.bound + BLOCK - 1) / BLOCK;
  const int64_t parts = (blocks + PART_BLOCKS - 1) / PART_BLOCKS, tasks = a.batch * a.kv_heads * parts;
  const int64_t room = lists * (PART_BLOCKS * BLOCK + 1), bytes = kernels.buffer(a);
  int32_t* memory = scratch<int32_t>(0, tasks * room * 2);  // little of it is ever touched
  std::vector<Taken> taken{size_t(tasks)};
  std::vector<int64_t> counts(size_t(tasks * lists)), totals(size_t(tasks * lists));
  std::vector<double> variances(size_t(tasks * lists));
  for (int64_t i = 0; i < tasks; i++) {
    taken[size_t(i)] = {memory + 2 * i * room, memory + (2 * i + 1) * room, counts.data() + i * lists,
                        totals.data() + i * lists, variances.data() + i * lists};
  }
  parallel_for(tasks, a.threads, [&](int64_t i) {
    const int64_t block = i % parts * PART_BLOCKS;
    const int64_t end = block + PART_BLOCKS < blocks ? block + PART_BLOCKS : blocks;
    kernels.draw({&a, i / parts / a.kv_heads, i / parts % a.kv_heads, block, end, taken[size_t(i)], scratch(1, bytes)});
  });
  parallel_for(a.batch * a.lists, a.threads, [&](int64_t i) {
    const int64_t head = i / lists;
    close_up({&a, i / a.lists, i % a.lists, parts, taken.data() + head * parts}, i % lists);
  });
}

void sample(const ks_key_sample_args& a, Isa isa) {
  check(a);
  require(a.heads >= 1 && a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
  const int64_t pairs = a.batch * a.kv_heads;
  const KeyCodesKernels& keys = KS_TABLE(key_codes, isa);
  const KeyScoreKernels& kernels = KS_TABLE(key_codes_score, isa);
  if (a.stages & PROBE) {
    const int64_t floats = keys.hash_buffer(a.dim, a.code_dim);
    parallel_for(pairs, a.threads, [&](int64_t i) {
      keys.probe(a, i / a.kv_heads, i % a.kv_heads, scratch<float>(1, floats));
    });
  }
  if (a.stages & FACTORS) {
    require(a.row >= 1 && a.row <= BLOCK && a.sample >= 2 * a.row, "row, sample: out of range");
    parallel_for(pairs, a.threads, [&](int64_t i) {
      kernels.factors(a, i / a.kv_heads, i % a.kv_heads, scratch(1, kernels.buffer(a)));
    });
  }
  if (a.stages & DRAW) {
    require(a.lists == a.kv_heads || a.lists == a.heads, "lists: out of range");
    draw(a, kernels);
  }
  if (a.stages & ESTIMATE) {
    const int64_t blocks = (a.bound + BLOCK - 1) / BLOCK;
    parallel_for(pairs * blocks, a.threads, [&](int64_t i) {
      const int64_t pair = i / blocks;
      kernels.estimate(a, pair / a.kv_heads, pair % a.kv_heads, i % blocks, scratch(1, kernels.buffer(a)));
    });
  }
}

}  // namespace

extern "C" {

KS_EXPORT int ks_key_hash(const ks_key_hash_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    hash(*a, KS_TABLE(key_codes, isa));
  });
}

KS_EXPORT int ks_key_sample(const ks_key_sample_args* a) {
  return guarded(a, [&](Isa isa) { sample(*a, isa); });
}

KS_EXPORT int ks_key_hamming(const ks_key_hamming_args* a) {
  return guarded(a, [&](Isa isa) {
    check(*a);
    const int64_t blocks = (a->bound + BLOCK - 1) / BLOCK;
    const KeyScoreKernels& kernels = KS_TABLE(key_codes_score, isa);
    parallel_for(a->batch * a->kv_heads * blocks, a->threads, [&](int64_t i) {
      const int64_t pair = i / blocks;
      kernels.hamming(*a, pair / a->kv_heads, pair % a->kv_heads, i % blocks);
    });
  });
}
}

}  // namespace ks
