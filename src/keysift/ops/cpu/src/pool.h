// Threads that are kept between calls, and memory that a thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace ks {

using Task = void (*)(void* context, int64_t index);

void run_tasks(int64_t n, int threads, Task task, void* context);

// Calls body(0) .. body(n - 1), in any order, on up to `threads` threads of which the caller is one. The first
// exception of a body is thrown again here; bodies that have not begun by then are left out. May be called from several
// threads at once, and from within a body.
template <class Body>
void parallel_for(int64_t n, int threads, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_tasks(n, threads, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); }, (void*)&body);
}

// Memory of the calling thread, 64-byte aligned, not cleared. It stays valid until the thread asks for the same slot
// again: slots 0 and 2 are for the function that is called, slot 1 for the bodies of its parallel_for. What is beyond a
// limit is given back with the next smaller request. Throws std::bad_alloc.
void* scratch(int slot, int64_t bytes);

template <class T>
T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch(slot, count * int64_t(sizeof(T))));
}

}  // namespace ks
