// Sums over the ranks of a group, and rows put together from all of them, in shared memory.
//
// Sums are taken in the order of the ranks, wherever they are taken: all get the same bits.

#include <string.h>

#include "shared_group.h"
#include "threads.h"

namespace fb {
namespace {

constexpr int64_t kSlotFloats = kSlotBytes / static_cast<int64_t>(sizeof(float));
constexpr int64_t kTaskFloats = 8192;      // a thread's work at a time: 32 KiB
constexpr int64_t kTwoStepsFloats = 4096;  // below it, one meeting is cheaper than less reading

const float* given(Group& group, int rank, uint32_t exchange) {
  return reinterpret_cast<const float*>(slot(group, rank, exchange));
}

// Calls body(first, last) for parts of [0, count) on all threads.
template <class Body>
void for_parts(int64_t count, Body&& body) {
  const int64_t num_tasks = (count + kTaskFloats - 1) / kTaskFloats;
  parallel_for(num_tasks, [&](int64_t task) {
    const int64_t first = task * kTaskFloats;
    body(first, first + kTaskFloats < count ? first + kTaskFloats : count);
  });
}

void copy(float* to, const float* from, int64_t count) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// to[i] = the sum over ranks of what they gave at i, for i in [first, last).
void sum(Group& group, uint32_t exchange, float* to, int64_t first, int64_t last) {
  const float* a = given(group, 0, exchange);
  const float* b = given(group, 1, exchange);
  for (int64_t i = first; i < last; ++i) to[i] = a[i] + b[i];
  for (int rank = 2; rank < group.size; ++rank) {
    const float* more = given(group, rank, exchange);
    for (int64_t i = first; i < last; ++i) to[i] += more[i];
  }
}

// The part of `count` that `rank` sums up for all, in whole lines of the cache.
struct Share {
  int64_t first, last;
};

Share share_of(int rank, int size, int64_t count) {
  const int64_t width = (count / size + 15) / 16 * 16;
  const int64_t first = rank * width < count ? rank * width : count;
  return {first, rank + 1 < size && first + width < count ? first + width : count};
}

// Every rank reads what all gave. The best for two ranks, and for little.
Status reduce_in_one_step(Group& group, uint32_t exchange, float* values, int64_t count,
                          int64_t timeout_ns) {
  const Status status = wait_for_all(group, enter(group), timeout_ns);
  if (status != kDone) return status;
  for_parts(count, [&](int64_t first, int64_t last) { sum(group, exchange, values, first, last); });
  return kDone;
}

// Every rank sums up its share, then reads the others': 2 (n - 1) / n of the values come from
// other cores, instead of n - 1 times all of them.
Status reduce_in_two_steps(Group& group, uint32_t exchange, float* values, int64_t count,
                           int64_t timeout_ns) {
  Status status = wait_for_all(group, enter(group), timeout_ns);
  if (status != kDone) return status;
  const Share own = share_of(group.rank, group.size, count);
  auto* sums = reinterpret_cast<float*>(slot(group, group.rank, exchange));
  for_parts(own.last - own.first, [&](int64_t first, int64_t last) {
    sum(group, exchange, values, own.first + first, own.first + last);
    // In the place of this rank's own values, which nobody else reads.
    copy(sums + own.first + first, values + own.first + first, last - first);
  });
  status = wait_for_all(group, enter(group), timeout_ns);
  if (status != kDone) return status;
  for (int rank = 0; rank < group.size; ++rank) {
    if (rank == group.rank) continue;
    const Share share = share_of(rank, group.size, count);
    const float* theirs = given(group, rank, exchange);
    for_parts(share.last - share.first, [&](int64_t first, int64_t last) {
      copy(values + share.first + first, theirs + share.first + first, last - first);
    });
  }
  return kDone;
}

}  // namespace
}  // namespace fb

using fb::Group;
using fb::Status;

// Replaces `values` by the sums over all ranks.
extern "C" Status fb_group_all_reduce(Group* group, float* values, int64_t count,
                                      int64_t timeout_ns) {
  for (int64_t start = 0; start < count; start += fb::kSlotFloats) {
    const int64_t rest = count - start;
    const int64_t length = rest < fb::kSlotFloats ? rest : fb::kSlotFloats;
    Status status = fb::wait_for_all(*group, group->phase, timeout_ns);
    if (status != fb::kDone) return status;
    const uint32_t exchange = group->exchange++;
    auto* mine = reinterpret_cast<float*>(fb::slot(*group, group->rank, exchange));
    fb::for_parts(length, [&](int64_t first, int64_t last) {
      fb::copy(mine + first, values + start + first, last - first);
    });
    const bool in_one_step = group->size == 2 || length < fb::kTwoStepsFloats;
    status = in_one_step
                 ? fb::reduce_in_one_step(*group, exchange, values + start, length, timeout_ns)
                 : fb::reduce_in_two_steps(*group, exchange, values + start, length, timeout_ns);
    if (status != fb::kDone) return status;
  }
  return fb::kDone;
}

// Writes `columns` (num_rows, width) into this rank's columns of a matrix in shared memory:
// `target` is the first of them, rows are `stride` floats apart. Rank 0 returns when all have
// written; it has the matrix until it enters its next collective.
extern "C" Status fb_group_gather(Group* group, const float* columns, int64_t num_rows,
                                  int64_t width, float* target, int64_t stride,
                                  int64_t timeout_ns) {
  const uint32_t last_gather = group->last_gather;
  if (group->rank != 0) {
    fb::Counter& lead = group->segment->arrived[0];
    const Status status = fb::wait_for(*group, lead, last_gather + 1, timeout_ns);
    if (status != fb::kDone) return status;
  } else {
    fb::enter(*group);
  }
  fb::parallel_for(num_rows, [&](int64_t row) {
    fb::copy(target + row * stride, columns + row * width, width);
  });
  if (group->rank != 0) {
    fb::enter(*group);
  }
  group->last_gather = group->phase;
  return group->rank == 0 ? fb::wait_for_all(*group, group->phase, timeout_ns) : fb::kDone;
}
