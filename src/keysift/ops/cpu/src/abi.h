// What every exported function of the library has in common.
//
//     extern "C" KS_EXPORT int ks_<name>(const ks_<name>_args* args);
//
// One struct of plain fields (int64_t, int32_t, float, pointers) that begins with KS_ARGS_HEAD and is mirrored, field
// by field, by a ctypes.Structure. Strides count elements. The function returns a status; what went wrong is the text
// of ks_last_error() on the calling thread. No exception leaves the library.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#define KS_EXPORT __attribute__((visibility("default")))

// size: sizeof of the struct; isa: an Isa, 0 for the best of this CPU; threads: at least 1.
#define KS_ARGS_HEAD \
  int64_t size;      \
  int32_t isa;       \
  int32_t threads;

namespace ks {

enum Status : int { KS_OK = 0, KS_BAD_ARGUMENT = 1, KS_NO_MEMORY = 2, KS_FAILED = 3 };

enum Isa : int32_t { AUTO = 0, PORTABLE = 1, AVX2 = 2, AVX512 = 3, AVX512_BF16 = 4, NEON = 5 };

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

inline int64_t bytes_of(int32_t dtype) { return dtype == FP32 ? 4 : 2; }

// What the caller did wrong: becomes KS_BAD_ARGUMENT.
struct BadArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool holds, const char* what) {
  if (!holds) throw BadArgument(what);
}

// The path to run: `isa` itself, or the best one for AUTO. Throws BadArgument where it was not compiled or this CPU
// lacks it.
Isa resolve(int32_t isa);

// Text of ks_last_error() on this thread.
void set_error(const char* text) noexcept;

// Runs body(isa) between checks of the head and the translation of exceptions.
template <class Args, class Body>
int guarded(const Args* args, Body&& body) noexcept {
  try {
    require(args != nullptr, "no arguments");
    if (args->size != int64_t(sizeof(Args))) {
      throw BadArgument("arguments of " + std::to_string(args->size) + " bytes, where the library has " +
                        std::to_string(sizeof(Args)) + ": it was built from other sources; build it again");
    }
    require(args->threads >= 1, "threads has to be at least 1");
    body(resolve(args->isa));
    return KS_OK;
  } catch (const BadArgument& error) {
    set_error(error.what());
    return KS_BAD_ARGUMENT;
  } catch (const std::bad_alloc&) {
    set_error("out of memory");
    return KS_NO_MEMORY;
  } catch (const std::exception& error) {
    set_error(error.what());
    return KS_FAILED;
  } catch (...) {
    set_error("unknown error");
    return KS_FAILED;
  }
}

}  // namespace ks
