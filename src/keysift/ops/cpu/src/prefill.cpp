// Query blocks of all heads and sequences, handed out one by one: the last blocks, which read most, first; heads of a
// group one behind the other, for their keys are then in the cache.
#include "prefill.h"

#include <atomic>

#include "attention_host.h"
#include "pool.h"

namespace ks {
namespace {

void check(const ks_prefill_args& a) {
  check_keys(a);
  require(a.block >= 1 && a.first >= 0 && a.query_blocks >= 0, "an impossible mask");
  require(0 <= a.tokens && a.tokens <= a.keys, "queries are the last of a sequence's positions: no more than keys");
  require(a.keys - a.tokens <= a.lo && a.hi <= a.keys, "positions without a query");
  for (int64_t b = 0; b < a.batch; b++) {
    require(a.start[b] >= 0 && a.start[b] + a.keys <= a.capacity, "a view reaches past the rows that there are");
  }
}

int64_t checked(int32_t count, int64_t width) {
  require(0 <= count && count <= width, "a count of key blocks is negative or larger than its list");
  return count;
}

PrefillTask task_of(const ks_prefill_args& a, int64_t b, int64_t h, int64_t i) {
  const int64_t first = (a.first + i) * a.block, last = first + a.block;
  const int64_t from = first > a.lo ? first : a.lo, to = last < a.hi ? last : a.hi;
  PrefillTask task = {};
  task.reach = reach_of(a, b, h / (a.heads / a.kv_heads));
  const int64_t token = from - (a.keys - a.tokens);
  task.queries = {element(a.q, a.q_dtype, b * a.q_stride0 + token * a.q_stride1 + h * a.q_stride2),
                  a.q_stride1,
                  a.q_dtype,
                  a.kv_dtype,
                  to - from,
                  a.dim,
                  a.v_dim,
                  a.scale};
  task.position = from;
  task.start = a.start[b];
  task.keys = a.keys;
  task.block = a.block;
  const int64_t row = (b * a.heads + h) * a.query_blocks + i, out = (b * (a.hi - a.lo) + from - a.lo) * a.heads + h;
  if (a.full_count) {
    task.full = a.full_index + row * a.full_width;
    task.full_count = checked(a.full_count[row], a.full_width);
    task.partial = a.partial_index + row * a.partial_width;
    task.partial_count = checked(a.partial_count[row], a.partial_width);
  } else {
    task.full_count = a.first + i;  // all before the diagonal
  }
  task.out = (void*)element(a.out, a.out_dtype, out * a.v_dim);
  task.lse = a.lse ? a.lse + out : nullptr;
  task.heads = a.heads;
  task.out_dtype = a.out_dtype;
  return task;
}

void run(const ks_prefill_args& a, const PrefillKernels& kernels) {
  check(a);
  if (a.hi <= a.lo) return;
  std::atomic<bool> exist{true};
  const int64_t rows = a.batch * a.heads;
  parallel_for(rows * a.query_blocks, a.threads, [&](int64_t item) {
    const int64_t i = a.query_blocks - 1 - item / rows, b = item % rows / a.heads, h = item % a.heads;
    PrefillTask task = task_of(a, b, h, i);
    if (task.queries.count <= 0) return;
    task.memory = scratch(1, prefill_bytes(task.queries.count, a.dim, a.v_dim));
    int32_t diagonal = int32_t(a.first + i);
    if (!a.full_count) {
      task.partial = &diagonal;
      task.partial_count = 1;
    }
    if (!kernels.run(task)) exist.store(false, std::memory_order_relaxed);
  });
  require(exist.load(), "a key block of the mask, or a page of the table, does not exist");
}

constexpr int64_t TOGETHER = 48;  // queries of a task: the packing of keys is shared by so many

void row_mass(const ks_row_mass_args& a, const PrefillKernels& kernels) {
  check_keys(a);
  require(a.block >= 1 && 0 <= a.tokens && a.tokens <= a.keys, "queries are the last of a sequence's positions");
  for (int64_t i = 0; i < a.rows; i++) {
    require(a.keys - a.tokens <= a.position[i] && a.position[i] < a.keys, "a position without a query");
    require(i == 0 || a.position[i - 1] <= a.position[i], "positions have to ascend");
  }
  for (int64_t b = 0; b < a.batch; b++) {
    require(a.start[b] >= 0 && a.start[b] + a.keys <= a.capacity, "a view reaches past the rows that there are");
  }
  const int64_t group = a.heads / a.kv_heads, per = TOGETHER / group < 1 ? 1 : TOGETHER / group;
  const int64_t parts = (a.rows + per - 1) / per, lists = a.batch * a.kv_heads;
  const int64_t blocks = (a.keys + a.block - 1) / a.block;
  std::atomic<bool> exist{true};
  parallel_for(group ? parts * lists : 0, a.threads, [&](int64_t item) {
    const int64_t part = parts - 1 - item / lists, b = item % lists / a.kv_heads, head = item % a.kv_heads * group;
    const int64_t from = part * per, rows = from + per < a.rows ? per : a.rows - from;
    MassTask task = {};
    task.reach = reach_of(a, b, head / group);
    task.queries = {element(a.q, a.q_dtype, b * a.q_stride0 + head * a.q_stride2),
                    a.q_stride1,
                    a.q_dtype,
                    a.kv_dtype,
                    rows * group,
                    a.dim,
                    a.dim,
                    a.scale};
    task.head_stride = a.q_stride2;
    task.position = a.position + from;
    task.rows = rows;
    task.group = group;
    task.first = a.keys - a.tokens;
    task.start = a.start[b];
    task.block = a.block;
    task.mass = a.mass + ((b * a.heads + head) * a.rows + from) * blocks;
    task.row_stride = blocks;
    task.mass_heads = a.rows * blocks;
    task.memory = scratch(1, prefill_bytes(rows * group, a.dim, a.dim));
    if (!kernels.mass(task)) exist.store(false, std::memory_order_relaxed);
  });
  require(exist.load(), "a page of the table does not exist");
}

}  // namespace
}  // namespace ks

extern "C" KS_EXPORT int ks_row_mass(const ks_row_mass_args* args) {
  return ks::guarded(args, [&](ks::Isa isa) { ks::row_mass(*args, KS_TABLE(ks::prefill, isa)); });
}

extern "C" KS_EXPORT int ks_prefill(const ks_prefill_args* args) {
  return ks::guarded(args, [&](ks::Isa isa) { ks::run(*args, KS_TABLE(ks::prefill, isa)); });
}
