// The rows of each sequence, cut into shares that threads take; merged as those of gather.cpp are.
#include "short.h"

#include <atomic>

#include "attention_host.h"
#include "pool.h"

namespace ks {
namespace {

constexpr int64_t SHARE = 256;  // rows, at least
constexpr int64_t MOST_ITEMS = 1024, MOST_SHARES = 64;

struct Sequence {
  int64_t shares, first_item;
};

struct Plan {
  Sequence* sequences;
  int64_t* owner;                 // sequence of an item
  std::atomic<int64_t>* missing;  // shares of a sequence that are not done
  int64_t items;
};

Plan make_plan(const ks_short_args& a) {
  const int64_t limit = MOST_ITEMS / a.batch, most = limit < 1 ? 1 : limit > MOST_SHARES ? MOST_SHARES : limit;
  const Blocks sizes = {a.batch * int64_t(sizeof(Sequence)), a.batch * most * 8, a.batch * 8};
  char* memory = (char*)scratch(0, sizes.end());
  Plan plan = {(Sequence*)memory, (int64_t*)(memory + sizes.at(1)), (std::atomic<int64_t>*)(memory + sizes.at(2)), 0};
  for (int64_t b = 0; b < a.batch; b++) {
    require(a.start[b] >= 0 && a.length[b] >= 0 && a.start[b] + a.length[b] <= a.capacity,
            "a view reaches past the rows that there are");
    const int64_t wanted = (a.length[b] + SHARE - 1) / SHARE;
    plan.sequences[b] = {wanted < 1 ? 1 : wanted > most ? most : wanted, plan.items};
    for (int64_t s = 0; s < plan.sequences[b].shares; s++) plan.owner[plan.items++] = b;
    new (&plan.missing[b]) std::atomic<int64_t>(plan.sequences[b].shares);
  }
  return plan;
}

ShortTask task_of(const ks_short_args& a, int64_t b, int64_t share, int64_t shares) {
  const int64_t group = a.heads / a.kv_heads;
  ShortTask task = {};
  task.reach = reach_of(a, b, 0);
  task.queries = {
      element(a.q, a.q_dtype, b * a.q_stride0), 0, a.q_dtype, a.kv_dtype, a.tokens * group, a.dim, a.v_dim, a.scale};
  task.kv_heads = a.kv_heads;
  task.group = group;
  task.q_token = a.q_stride1;
  task.q_head = a.q_stride2;
  task.start = a.start[b];
  task.length = a.length[b];
  const int64_t step = (a.length[b] + shares - 1) / shares;
  task.from = step * share < task.length ? step * share : task.length;
  task.to = step * (share + 1) < task.length ? step * (share + 1) : task.length;
  return task;
}

void merge_all(const ks_short_args& a, const ShortKernels& kernels, int64_t b, const float* first, int64_t stride,
               int64_t shares) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t h = 0; h < a.heads; h++) {
    for (int64_t t = 0; t < a.tokens; t++) {
      const int64_t from = h / group * a.tokens * group + t * group + h % group, to = (b * a.tokens + t) * a.heads + h;
      kernels.merge({first + from * partial_floats(a.v_dim), stride, shares, a.v_dim, a.kv_dtype, a.out_dtype,
                     (void*)element(a.out, a.out_dtype, to * a.v_dim), a.lse + to});
    }
  }
}

void run(const ks_short_args& a, const ShortKernels& kernels) {
  check_keys(a);
  require(a.tokens >= 0, "tokens is negative");
  if (a.batch == 0 || a.heads == 0 || a.tokens == 0) return;
  const Plan plan = make_plan(a);
  const int64_t part_floats = a.heads * a.tokens * partial_floats(a.v_dim);
  int64_t rows = 0;
  for (int64_t b = 0; b < a.batch; b++) rows += a.length[b];
  float* parts = plan.items > a.batch ? scratch<float>(2, plan.items * part_floats) : nullptr;
  const int threads = worth(a.threads, rows * a.kv_heads * (a.dim + a.v_dim) * bytes_of(a.kv_dtype));
  std::atomic<bool> exist{true};
  parallel_for(plan.items, threads, [&](int64_t item) {
    const int64_t b = plan.owner[item], shares = plan.sequences[b].shares;
    ShortTask task = task_of(a, b, item - plan.sequences[b].first_item, shares);
    const int64_t own = Blocks{short_bytes(a.kv_heads, task.queries.count, a.dim)}.end();
    char* memory = (char*)scratch(1, own + part_floats * 4);
    task.memory = memory;
    task.partial = shares > 1 ? parts + item * part_floats : (float*)(memory + own);
    if (!kernels.share(task)) exist.store(false, std::memory_order_relaxed);
    if (plan.missing[b].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const float* first = shares > 1 ? parts + plan.sequences[b].first_item * part_floats : task.partial;
    merge_all(a, kernels, b, first, part_floats, shares);
  });
  require(exist.load(), "a page of the table does not exist");
}

}  // namespace
}  // namespace ks

extern "C" KS_EXPORT int ks_short(const ks_short_args* args) {
  return ks::guarded(args, [&](ks::Isa isa) { ks::run(*args, KS_TABLE(ks::few, isa)); });
}
