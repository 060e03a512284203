// The threads that share one kernel's work, and memory that belongs to each of them.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fb {

// Threads that work on a kernel, the caller included.
int num_threads();

// Calls task(context, i) once for each i in [0, num_tasks), in any order, on all threads; returns
// when all calls have. One kernel runs at a time: callers from other threads wait for their turn.
void run_tasks(int64_t num_tasks, void (*task)(void* context, int64_t index), void* context);

template <class Body>
void parallel_for(int64_t num_tasks, Body&& body) {
  if (num_tasks == 1 || num_threads() == 1) {
    for (int64_t i = 0; i < num_tasks; ++i) body(i);
    return;
  }
  run_tasks(
      num_tasks, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// As parallel_for, but body(first, last) gets neighbouring tasks together: for small ones, and for
// what is worth setting up only once for several.
template <class Body>
void parallel_ranges(int64_t num_tasks, Body&& body) {
  const int64_t per_range = num_tasks / (8 * num_threads()) + 1;
  parallel_for((num_tasks + per_range - 1) / per_range, [&](int64_t range) {
    const int64_t first = range * per_range;
    body(first, first + per_range < num_tasks ? first + per_range : num_tasks);
  });
}

// At least `size_bytes` of memory, aligned to 64 bytes, that stays the calling thread's own until
// it asks again for the same slot. Contents are undefined.
enum class Scratch { packing, attention, other, count };
void* scratch(Scratch slot, size_t size_bytes);

}  // namespace fb
