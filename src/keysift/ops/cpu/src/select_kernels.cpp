// What the mass of entries is computed with.
#include "select.h"

#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

float highest_score(const float* score, int64_t n) {
  f32v top = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) top = most_of(load(score + i), top);  // the second where the first is no number
  float most = largest(top);
  for (; i < n; i++) most = score[i] > most ? score[i] : most;
  return most;
}

KS_INLINE f32v mass_of(f32v score, float top) {
  const f32v mass = exp(score - set1(top));
  return score > set1(-__builtin_inff()) ? mass : zero();
}

void masses(const float* score, int64_t n, float top, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, mass_of(load(score + i), top));
  if (i == n) return;
  float rest[W] = {};
  std::memcpy(rest, score + i, size_t(n - i) * 4);
  store(rest, mass_of(load(rest), top));
  std::memcpy(to + i, rest, size_t(n - i) * 4);
}

KS_INLINE i32v key_of_score(f32v score) {
  const i32v bits = (i32v)(score + zero());  // -0 is 0
  const i32v key = bits ^ ((bits >> 31) | set1_int(int32_t(0x80000000u)));
  return score > set1(-__builtin_inff()) ? key : i32v{};
}

void keys(const float* score, int64_t n, uint32_t* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const i32v key = key_of_score(load(score + i));
    std::memcpy(to + i, &key, sizeof key);
  }
  if (i == n) return;
  float rest[W] = {};
  std::memcpy(rest, score + i, size_t(n - i) * 4);
  const i32v key = key_of_score(load(rest));
  std::memcpy(to + i, &key, size_t(n - i) * 4);
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(SelectKernels, select) = {KS_ISA::highest_score, KS_ISA::masses, KS_ISA::keys};

}  // namespace ks
