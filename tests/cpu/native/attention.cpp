// Pool and attention kernels on every path that this CPU has, for the sanitizers: threads that call at once, faults in
// tasks, rows at the very ends of exact allocations, and results that do not depend on the number of threads.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "gather.h"
#include "pool.h"
#include "prefill.h"
#include "short.h"

extern "C" {
int ks_isas(int64_t* of_library, int64_t* of_cpu);
int ks_gather(const ks_gather_args*);
int ks_short(const ks_short_args*);
int ks_prefill(const ks_prefill_args*);
}

namespace {

constexpr int64_t HEADS = 6, KV_HEADS = 2;
int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  failures++;
}

// Exactly as large as it has to be, so that AddressSanitizer sees what is read beyond.
struct Keys {
  int64_t rows, dim;
  int32_t dtype;
  std::vector<char> k, v;
  std::vector<float> q;

  Keys(int64_t rows, int64_t dim, int32_t dtype, int64_t tokens) : rows(rows), dim(dim), dtype(dtype) {
    const int64_t n = rows * KV_HEADS * dim;
    k.resize(size_t(n * ks::bytes_of(dtype)));
    v.resize(k.size());
    for (int64_t i = 0; i < n; i++) put(k, i, std::sin(float(i)));
    for (int64_t i = 0; i < n; i++) put(v, i, std::cos(float(3 * i)));
    q.resize(size_t(tokens * HEADS * dim));
    for (size_t i = 0; i < q.size(); i++) q[i] = std::sin(float(5 * i));
  }

  void put(std::vector<char>& to, int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == ks::FP32) std::memcpy(&to[size_t(i) * 4], &bits, 4);
    const uint16_t half = dtype == ks::BF16 ? uint16_t(bits >> 16) : uint16_t(0x3800 | (bits >> 13 & 0x3ff));
    if (dtype != ks::FP32) std::memcpy(&to[size_t(i) * 2], &half, 2);
  }

  template <class Args>
  Args args(int isa, int threads) const {
    Args a;
    std::memset(&a, 0, sizeof a);
    a.size = sizeof a;
    a.isa = isa;
    a.threads = threads;
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.k_stride0 = a.v_stride0 = rows * KV_HEADS * dim;
    a.k_stride1 = a.v_stride1 = KV_HEADS * dim;
    a.k_stride2 = a.v_stride2 = dim;
    a.capacity = rows;
    a.batch = 1;
    a.heads = HEADS;
    a.kv_heads = KV_HEADS;
    a.dim = a.v_dim = dim;
    a.kv_dtype = dtype;
    a.scale = 0.1f;
    return a;
  }
};

std::vector<float> gathered(const Keys& keys, int isa, int threads) {
  std::vector<int32_t> rows, count(HEADS);
  for (int64_t h = 0; h < HEADS; h++) {
    for (int64_t i = 0; i < keys.rows; i++) rows.push_back(int32_t(keys.rows - 1 - i));
    count[size_t(h)] = int32_t(keys.rows - h < 0 ? 0 : keys.rows - h);
  }
  std::vector<float> out(size_t(HEADS * keys.dim)), lse(HEADS);
  auto a = keys.args<ks_gather_args>(isa, threads);
  a.q_stride0 = HEADS * keys.dim;
  a.q_stride1 = keys.dim;
  a.slots = HEADS;
  a.rows = rows.data();
  a.count = count.data();
  a.rows_stride1 = a.width = keys.rows;
  a.count_stride1 = 1;
  a.out = out.data();
  a.lse = lse.data();
  expect(ks_gather(&a) == ks::KS_OK, "gather");
  return out;
}

std::vector<float> attended(const Keys& keys, int isa, int threads, int64_t tokens) {
  const int64_t start = 1, length = keys.rows - 1;
  std::vector<float> out(size_t(tokens * HEADS * keys.dim)), lse(size_t(tokens * HEADS));
  auto a = keys.args<ks_short_args>(isa, threads);
  a.q_stride1 = HEADS * keys.dim;
  a.q_stride2 = keys.dim;
  a.tokens = tokens;
  a.start = &start;
  a.length = &length;
  a.out = out.data();
  a.lse = lse.data();
  expect(ks_short(&a) == ks::KS_OK, "short");
  return out;
}

std::vector<float> prefilled(const Keys& keys, int isa, int threads, int64_t tokens) {
  const int64_t start = 0;
  std::vector<float> out(size_t(tokens * HEADS * keys.dim)), lse(size_t(tokens * HEADS));
  auto a = keys.args<ks_prefill_args>(isa, threads);
  a.q_stride1 = HEADS * keys.dim;
  a.q_stride2 = keys.dim;
  a.tokens = tokens;
  a.keys = keys.rows;
  a.start = &start;
  a.block = 16;
  a.query_blocks = (keys.rows + 15) / 16;
  a.lo = keys.rows - tokens;
  a.hi = keys.rows;
  a.out = out.data();
  a.lse = lse.data();
  expect(ks_prefill(&a) == ks::KS_OK, "prefill");
  return out;
}

void kernels(int isa) {
  for (int32_t dtype : {ks::FP32, ks::BF16, ks::FP16}) {
    for (int64_t dim : {64, 80, 40, 13}) {
      for (int64_t rows : {1, 33, 700}) {
        const int64_t tokens = rows < 5 ? rows : 5;
        const Keys keys(rows, dim, dtype, tokens);
        expect(gathered(keys, isa, 1) == gathered(keys, isa, 3), "gather depends on the number of threads");
        expect(attended(keys, isa, 1, tokens) == attended(keys, isa, 3, tokens), "short depends on it");
        expect(prefilled(keys, isa, 1, tokens) == prefilled(keys, isa, 3, tokens), "prefill depends on it");
      }
    }
  }
}

void pool() {
  for (int64_t n : {0, 1, 2, 1000}) {
    std::vector<int64_t> done(size_t(n), 0);
    ks::parallel_for(n, 4, [&](int64_t i) { done[size_t(i)]++; });
    for (int64_t times : done) expect(times == 1, "a task ran once");
  }
  for (int round = 0; round < 200; round++) {
    try {
      ks::parallel_for(16, 3, [&](int64_t i) {
        if (i == round % 16) throw std::bad_alloc();
        ks::scratch<char>(1, 1 << (i + 2))[0] = 1;
      });
      expect(false, "an exception of a task reaches the caller");
    } catch (const std::bad_alloc&) {
    }
  }
  int64_t inner[4] = {};
  ks::parallel_for(4, 3, [&](int64_t i) {
    ks::parallel_for(8, 3, [&](int64_t) { __atomic_fetch_add(&inner[i], 1, __ATOMIC_RELAXED); });
  });
  for (int64_t times : inner) expect(times == 8, "a job within a task runs");
}

}  // namespace

int main() {
  int64_t compiled, usable;
  ks_isas(&compiled, &usable);
  pool();
  for (int isa = ks::PORTABLE; isa <= ks::NEON; isa++) {
    if (usable >> isa & 1) kernels(isa);
  }
  const Keys keys(3000, 64, ks::BF16, 2);
  const std::vector<float> want = attended(keys, ks::AUTO, 1, 2);
  std::vector<std::thread> callers;
  int64_t wrong = 0;
  for (int caller = 0; caller < 4; caller++) {
    callers.emplace_back([&] {
      for (int i = 0; i < 20; i++) {
        if (attended(keys, ks::AUTO, 3, 2) != want) __atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "calls at once give what one gives");
  return failures ? 1 : 0;
}
