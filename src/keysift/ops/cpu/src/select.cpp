// Thresholds by histograms of the scores' bits: eleven at a time, so that three passes find any.
#include "select.h"

#include <cmath>
#include <cstring>

#include "pool.h"

namespace ks {
namespace {

constexpr int BINS = 2048, SHIFTS[] = {21, 10, 0}, WIDTHS[] = {11, 11, 10};

// What a threshold leaves open: of the entries that have this key, the first `ties`.
struct Cut {
  uint32_t key;
  int64_t ties;
};

struct Histogram {
  int64_t count[BINS];
  double mass[BINS];
};

// The bits of keys whose higher bits are those of `known`.
void fill(Histogram& h, const uint32_t* keys, const float* mass, int64_t n, int pass, uint32_t known) {
  std::memset(h.count, 0, sizeof h.count);
  if (mass) std::memset(h.mass, 0, sizeof h.mass);
  const int shift = SHIFTS[pass], above = shift + WIDTHS[pass];
  const uint32_t low = (uint32_t(1) << WIDTHS[pass]) - 1;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = keys[i];
    if (pass && key >> above != known >> above) continue;
    h.count[key >> shift & low]++;
    if (mass) h.mass[key >> shift & low] += mass[i];
  }
}

// The cut of the `count` highest of entries that may be chosen.
Cut cut_by_count(const uint32_t* keys, int64_t n, int64_t count, Histogram& h) {
  uint32_t known = 0;
  for (int pass = 0; pass < 3; pass++) {
    fill(h, keys, nullptr, n, pass, known);
    int bin = (1 << WIDTHS[pass]) - 1;
    while (bin > 0 && h.count[bin] < count) count -= h.count[bin--];
    known |= uint32_t(bin) << SHIFTS[pass];
  }
  return {known, count};
}

// The cut of the fewest whose mass reaches `wanted`, but at most `count`.
Cut cut_by_mass(const uint32_t* keys, const float* mass, int64_t n, int64_t count, double wanted, Histogram& h) {
  uint32_t known = 0;
  for (int pass = 0; pass < 3; pass++) {
    fill(h, keys, mass, n, pass, known);
    int bin = (1 << WIDTHS[pass]) - 1;
    while (bin > 0 && h.count[bin] < count && h.mass[bin] < wanted) {
      wanted -= h.mass[bin];
      count -= h.count[bin--];
    }
    known |= uint32_t(bin) << SHIFTS[pass];
    if (pass < 2) continue;
    const int64_t ties = h.count[bin] < count ? h.count[bin] : count;
    const double each = h.count[bin] ? h.mass[bin] / double(h.count[bin]) : 0;
    const double needed = each > 0 ? std::ceil(wanted / each) : double(ties);
    return {known, wanted <= 0 ? 0 : needed < double(ties) ? int64_t(needed) : ties};
  }
  return {0, 0};
}

int64_t write(const uint32_t* keys, int64_t n, Cut cut, int32_t* index) {
  int64_t used = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = keys[i];
    if (key < cut.key || key == 0) continue;
    if (key == cut.key && --cut.ties < 0) continue;
    index[used++] = int32_t(i);
  }
  return used;
}

void choose_row(const ks_choose_args& a, const SelectKernels& kernels, int64_t row, Histogram& h, uint32_t* keys) {
  const float* score = a.score + row * a.stride;
  int32_t* index = a.index + row * a.most;
  int64_t count = a.count[row] < a.most ? a.count[row] : a.most;
  count = count < a.entries ? count : a.entries;
  kernels.keys(score, a.entries, keys);
  if (count <= 0 || a.share < 0) {
    a.used[row] = int32_t(choose(keys, a.entries, count, index));
    return;
  }
  float* mass = reinterpret_cast<float*>(keys + a.entries);
  const float top = kernels.highest(score, a.entries);
  if (!(top > -INFINITY)) {
    a.used[row] = 0;
    return;
  }
  kernels.masses(score, a.entries, top, mass);
  double total = 0;
  for (int64_t i = 0; i < a.entries; i++) total += mass[i];
  const Cut cut = cut_by_mass(keys, mass, a.entries, count, a.share * total, h);
  a.used[row] = int32_t(write(keys, a.entries, cut, index));
}

}  // namespace

int64_t choose(const uint32_t* keys, int64_t entries, int64_t count, int32_t* index) {
  if (count <= 0) return 0;
  Histogram h;
  return write(keys, entries, cut_by_count(keys, entries, count, h), index);
}

extern "C" KS_EXPORT int ks_choose(const ks_choose_args* a) {
  return guarded(a, [&](Isa isa) {
    require(a->rows >= 0 && a->entries >= 0 && a->most >= 0, "rows, entries, most: out of range");
    const SelectKernels& kernels = KS_TABLE(select, isa);
    parallel_for(a->rows, a->threads, [&](int64_t row) {
      Histogram h;
      choose_row(*a, kernels, row, h, scratch<uint32_t>(1, 2 * a->entries + 1));
    });
  });
}

}  // namespace ks
