// Which instruction sets were compiled, which this CPU has, and the last error of a thread.
#include "dispatch.h"

#include <cstdio>

namespace ks {
namespace {

const char* const NAMES[] = {"auto", "portable", "avx2", "avx512", "avx512_bf16", "neon"};

bool compiled(int32_t isa) {
  switch (isa) {
    case PORTABLE:
      return true;
#ifdef KS_HAVE_AVX2
    case AVX2:
      return true;
#endif
#ifdef KS_HAVE_AVX512
    case AVX512:
      return true;
#endif
#ifdef KS_HAVE_AVX512_BF16
    case AVX512_BF16:
      return true;
#endif
#ifdef KS_HAVE_NEON
    case NEON:
      return true;
#endif
    default:
      return false;
  }
}

// CPU and operating system: the latter has to save the wide registers.
bool supported(int32_t isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == AVX2) return avx2;
  if (isa == AVX512) return avx512;
#ifdef KS_HAVE_AVX512_BF16
  if (isa == AVX512_BF16) {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
#endif
  return isa == PORTABLE || isa == NEON;  // every aarch64 CPU has NEON, and no other compiles it
}

bool usable(int32_t isa) {
  static const struct Usable {
    bool of[6] = {};
    Usable() {
      for (int32_t i = PORTABLE; i <= NEON; i++) of[i] = compiled(i) && supported(i);
    }
  } known;
  return isa >= PORTABLE && isa <= NEON && known.of[isa];
}

thread_local char last_error[512];

}  // namespace

Isa resolve(int32_t isa) {
  if (isa == AUTO) {
    for (int32_t best = NEON; best > PORTABLE; best--) {
      if (usable(best)) return Isa(best);
    }
    return PORTABLE;
  }
  if (!usable(isa)) {
    const bool known = isa >= PORTABLE && isa <= NEON;
    throw BadArgument("isa=" + (known ? std::string(NAMES[isa]) : std::to_string(isa)) + ": this " +
                      (known && compiled(isa) ? "CPU lacks it" : "library was built without it"));
  }
  return Isa(isa);
}

void set_error(const char* text) noexcept { std::snprintf(last_error, sizeof last_error, "%s", text); }

}  // namespace ks

extern "C" {

KS_EXPORT const char* ks_last_error() { return ks::last_error; }

// Bit i is set for Isa i. Of the two, those that can be forced are in both.
KS_EXPORT int ks_isas(int64_t* of_library, int64_t* of_cpu) {
  *of_library = *of_cpu = 0;
  for (int32_t i = ks::PORTABLE; i <= ks::NEON; i++) {
    if (ks::compiled(i)) *of_library |= int64_t(1) << i;
    if (ks::usable(i)) *of_cpu |= int64_t(1) << i;
  }
  return ks::KS_OK;
}
}
