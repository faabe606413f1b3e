// Lists of rows, cut into shares that threads take. A list's shares depend on its length alone, and are merged in their
// order by whom finishes the last of them: results do not depend on the number of threads.
#include "gather.h"

#include <atomic>

#include "attention_host.h"
#include "pool.h"

namespace ks {
namespace {

constexpr int64_t SHARE = 1024;  // rows
constexpr int64_t MOST_ITEMS = 2048;

// A list: row `slot` of sequence `b`.
struct List {
  int64_t b, slot, selected, outside, total, shares, first_item;
};

struct Plan {
  List* lists;
  int64_t* owner;                 // list of an item
  std::atomic<int64_t>* missing;  // shares of a list that are not done
  float* parts;
  int64_t items, part_floats;
};

List measure(const ks_gather_args& a, int64_t index) {
  List list = {index / a.slots, index % a.slots, 0, 0, 0, 0, 0};
  const int64_t at = list.b * a.count_stride0 + list.slot * a.count_stride1;
  list.selected = a.long_count ? ((const int64_t*)a.count)[at] : ((const int32_t*)a.count)[at];
  require(0 <= list.selected && list.selected <= a.width,
          "a count of selected rows is negative or larger than the list");
  if (a.start) {
    list.outside = a.length[list.b] - a.middle_length[list.b];
    const int64_t before = a.middle_start[list.b] - a.start[list.b];
    const bool nowhere = list.outside == 0 || a.middle_length[list.b] == 0;  // an empty middle may be anywhere
    require(list.outside >= 0 && (nowhere || before >= 0), "the middle has to be a part of the view");
  }
  list.total = list.selected + list.outside;
  return list;
}

Plan make_plan(const ks_gather_args& a) {
  const int64_t lists = a.batch * a.slots, queries = a.heads / a.slots;
  const int64_t most = MOST_ITEMS / lists < 1 ? 1 : MOST_ITEMS / lists > 64 ? 64 : MOST_ITEMS / lists;
  const int64_t most_items = lists * most;
  Plan plan = {};
  plan.part_floats = queries * partial_floats(a.v_dim);
  const Blocks sizes = {lists * int64_t(sizeof(List)), most_items * 8, lists * 8};
  char* memory = (char*)scratch(0, sizes.end());
  plan.lists = (List*)memory;
  plan.owner = (int64_t*)(memory + sizes.at(1));
  plan.missing = (std::atomic<int64_t>*)(memory + sizes.at(2));
  for (int64_t i = 0; i < lists; i++) {
    List list = measure(a, i);
    const int64_t wanted = (list.total + SHARE - 1) / SHARE;
    list.shares = wanted < 1 ? 1 : wanted > most ? most : wanted;
    list.first_item = plan.items;
    for (int64_t s = 0; s < list.shares; s++) plan.owner[plan.items++] = i;
    new (&plan.missing[i]) std::atomic<int64_t>(list.shares);
    plan.lists[i] = list;
  }
  return plan;
}

GatherTask task_of(const ks_gather_args& a, const List& list, int64_t share) {
  const int64_t queries = a.heads / a.slots, kv_head = list.slot / (a.slots / a.kv_heads);
  GatherTask task = {};
  task.reach = reach_of(a, list.b, kv_head);
  task.queries = {element(a.q, a.q_dtype, list.b * a.q_stride0 + list.slot * queries * a.q_stride1),
                  a.q_stride1,
                  a.q_dtype,
                  a.kv_dtype,
                  queries,
                  a.dim,
                  a.v_dim,
                  a.scale};
  task.rows = (const char*)a.rows + (a.long_rows ? 8 : 4) * (list.b * a.rows_stride0 + list.slot * a.rows_stride1);
  task.long_rows = a.long_rows;
  if (a.log_w) task.log_w = a.log_w + list.b * a.log_w_stride0 + list.slot * a.log_w_stride1;
  if (a.law) task.mean = a.mean + (list.b * a.kv_heads + kv_head) * a.dim;
  task.law = a.law;
  task.entries = a.entries;
  if (a.start) {
    task.first = a.start[list.b];
    task.before = a.middle_length[list.b] ? a.middle_start[list.b] - a.start[list.b] : list.outside;
    task.behind = a.middle_start[list.b] + a.middle_length[list.b];
    task.outside = list.outside;
  }
  const int64_t step = (list.total + list.shares - 1) / list.shares;
  task.from = step * share < list.total ? step * share : list.total;
  task.to = step * (share + 1) < list.total ? step * (share + 1) : list.total;
  return task;
}

void check(const ks_gather_args& a) {
  check_keys(a);
  require(a.slots == a.kv_heads || a.slots == a.heads, "rows have to be selected per KV head or per query head");
  require(a.width >= 0, "width is negative");
  require(!a.law || (a.entries >= 2 && a.mean), "a law needs a mean and a table of at least 2 entries");
}

void run(const ks_gather_args& a, const GatherKernels& kernels) {
  check(a);
  if (a.batch == 0 || a.heads == 0) return;
  const Plan plan = make_plan(a);
  const int64_t queries = a.heads / a.slots, lists = a.batch * a.slots;
  int64_t rows = 0;
  for (int64_t i = 0; i < lists; i++) rows += plan.lists[i].total;
  float* parts = plan.items > lists ? scratch<float>(2, plan.items * plan.part_floats) : nullptr;
  const int threads = worth(a.threads, rows * (a.dim + a.v_dim) * bytes_of(a.kv_dtype));
  std::atomic<bool> exist{true};
  parallel_for(plan.items, threads, [&](int64_t item) {
    const List& list = plan.lists[plan.owner[item]];
    GatherTask task = task_of(a, list, item - list.first_item);
    const int64_t own = gather_bytes(queries, a.dim);
    char* memory = (char*)scratch(1, own + plan.part_floats * 4);
    task.memory = memory;
    task.partial = list.shares > 1 ? parts + item * plan.part_floats : (float*)(memory + own);
    if (!kernels.share(task)) exist.store(false, std::memory_order_relaxed);
    if (plan.missing[plan.owner[item]].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const float* first = list.shares > 1 ? parts + list.first_item * plan.part_floats : task.partial;
    for (int64_t m = 0; m < queries; m++) {
      const int64_t query = list.b * a.heads + list.slot * queries + m;
      void* out = (void*)element(a.out, a.out_dtype, query * a.v_dim);
      kernels.merge({first + m * partial_floats(a.v_dim), plan.part_floats, list.shares, a.v_dim, a.kv_dtype,
                     a.out_dtype, out, a.lse + query});
    }
  });
  require(exist.load(), "a selected row is not in the buffer, or a page of the table does not exist");
}

}  // namespace
}  // namespace ks

extern "C" KS_EXPORT int ks_gather(const ks_gather_args* args) {
  return ks::guarded(args, [&](ks::Isa isa) { ks::run(*args, KS_TABLE(ks::gather, isa)); });
}
