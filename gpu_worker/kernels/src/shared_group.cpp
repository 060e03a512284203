// Waiting in shared memory, and what a group needs besides all-reduce: messages and minima.

#include "shared_group.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace fb {
namespace {

constexpr int kSpins = 200;    // of a pause each: about 5 us
constexpr int kYields = 1000;  // about half a millisecond if nobody else wants the core
constexpr int64_t kLookUpNs = 100'000'000;
constexpr int64_t kSecondNs = 1'000'000'000;

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kSecondNs + now.tv_nsec;
}

// The words lie in memory of several processes: none of these calls is the private kind.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t timeout_ns) {
  const timespec timeout = {timeout_ns / kSecondNs, timeout_ns % kSecondNs};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool is_peer_gone(Group& group) {
  return poll(group.peers, static_cast<nfds_t>(group.num_peers), 0) > 0;
}

Status sleep_until(Group& group, Counter& counter, uint32_t goal, int64_t timeout_ns) {
  const int64_t started_ns = now_ns();
  for (;;) {
    const int64_t waited_ns = now_ns() - started_ns;
    const bool is_bounded = timeout_ns >= 0;
    int64_t slice_ns = kLookUpNs;
    if (is_bounded && timeout_ns - waited_ns < slice_ns) slice_ns = timeout_ns - waited_ns;
    // Announced before the last look: who raises the number either sees that or is seen.
    counter.num_sleeping.fetch_add(1);
    const uint32_t seen = counter.value.load();
    if (!has_reached(counter, goal) && slice_ns > 0) futex_wait(counter.value, seen, slice_ns);
    counter.num_sleeping.fetch_sub(1);
    if (has_reached(counter, goal)) return kDone;
    if (group.segment->broken.load() != 0) return kBroken;
    if (is_bounded && now_ns() - started_ns >= timeout_ns) {
      group.segment->broken.store(1);
      return kTimedOut;
    }
    if (is_peer_gone(group)) {
      // It may have raised the number as the last thing it did.
      if (has_reached(counter, goal)) return kDone;
      group.segment->broken.store(1);
      return kPeerGone;
    }
  }
}

}  // namespace

void raise(Counter& counter, uint32_t value) {
  counter.value.store(value);
  if (counter.num_sleeping.load() != 0) futex_wake_all(counter.value);
}

Status wait_for(Group& group, Counter& counter, uint32_t goal, int64_t timeout_ns) {
  for (int i = 0; i < kSpins; ++i) {
    if (has_reached(counter, goal)) return kDone;
    _mm_pause();
  }
  for (int i = 0; i < kYields; ++i) {
    sched_yield();
    if (has_reached(counter, goal)) return kDone;
  }
  return sleep_until(group, counter, goal, timeout_ns);
}

Status wait_for_all(Group& group, uint32_t phase, int64_t timeout_ns) {
  for (int rank = 0; rank < group.size; ++rank) {
    if (rank == group.rank) continue;
    const Status status = wait_for(group, group.segment->arrived[rank], phase, timeout_ns);
    if (status != kDone) return status;
  }
  return kDone;
}

uint32_t enter(Group& group) {
  raise(group.segment->arrived[group.rank], ++group.phase);
  return group.phase;
}

unsigned char* slot(Group& group, int rank, uint32_t exchange) {
  auto* slots = reinterpret_cast<unsigned char*>(group.segment + 1);
  return slots + (rank * 2 + exchange % 2) * kSlotBytes;
}

}  // namespace fb

using fb::Group;
using fb::Status;

extern "C" int64_t fb_group_segment_bytes(int64_t size) {
  return static_cast<int64_t>(sizeof(fb::Segment)) + size * 2 * fb::kSlotBytes;
}

// `segment` is mapped by all ranks and stays so until fb_group_leave. `peers` are descriptors that
// become readable when a rank ends. Null if there is no memory or there are too many ranks.
extern "C" Group* fb_group_join(void* segment, int64_t rank, int64_t size, const int32_t* peers,
                                int64_t num_peers) {
  if (size > fb::kMaxRanks || num_peers > fb::kMaxRanks) return nullptr;
  auto* group = static_cast<Group*>(calloc(1, sizeof(Group)));
  if (group == nullptr) return nullptr;
  group->segment = static_cast<fb::Segment*>(segment);
  group->rank = static_cast<int>(rank);
  group->size = static_cast<int>(size);
  group->num_peers = static_cast<int>(num_peers);
  for (int i = 0; i < group->num_peers; ++i) group->peers[i] = {peers[i], POLLIN, 0};
  return group;
}

extern "C" void fb_group_leave(Group* group) { free(group); }

// Replaces `value` by the least of all ranks'; until all have given theirs, nobody returns.
extern "C" Status fb_group_minimum(Group* group, int64_t* value, int64_t timeout_ns) {
  Status status = fb::wait_for_all(*group, group->phase, timeout_ns);
  if (status != fb::kDone) return status;
  const uint32_t exchange = group->exchange++;
  memcpy(fb::slot(*group, group->rank, exchange), value, sizeof *value);
  status = fb::wait_for_all(*group, fb::enter(*group), timeout_ns);
  if (status != fb::kDone) return status;
  for (int rank = 0; rank < group->size; ++rank) {
    int64_t other;
    memcpy(&other, fb::slot(*group, rank, exchange), sizeof other);
    if (other < *value) *value = other;
  }
  return fb::kDone;
}

// Rank 0: gives a message to all others. It waits only for one that is two pieces behind.
extern "C" Status fb_group_post(Group* group, const unsigned char* bytes, int64_t num_bytes,
                                int64_t timeout_ns) {
  fb::Segment& segment = *group->segment;
  int64_t start = 0;
  do {
    const uint32_t number = segment.posted.value.load() + 1;
    for (int rank = 1; rank < group->size; ++rank) {
      const Status status = fb::wait_for(*group, segment.taken[rank], number - 2, timeout_ns);
      if (status != fb::kDone) return status;
    }
    fb::MessagePiece& piece = segment.pieces[number % 2];
    const int64_t rest = num_bytes - start;
    const int64_t length = rest < fb::kMessageBytes ? rest : fb::kMessageBytes;
    piece.message_bytes = num_bytes;
    if (length > 0) memcpy(piece.bytes, bytes + start, static_cast<size_t>(length));
    fb::raise(segment.posted, number);
    start += length;
  } while (start < num_bytes);
  return fb::kDone;
}

// The others: waits for the next message and tells its length. fb_group_take must follow.
extern "C" Status fb_group_await(Group* group, int64_t* num_bytes, int64_t timeout_ns) {
  fb::Segment& segment = *group->segment;
  const uint32_t number = segment.taken[group->rank].value.load() + 1;
  const Status status = fb::wait_for(*group, segment.posted, number, timeout_ns);
  if (status == fb::kDone) *num_bytes = segment.pieces[number % 2].message_bytes;
  return status;
}

extern "C" Status fb_group_take(Group* group, unsigned char* bytes, int64_t num_bytes,
                                int64_t timeout_ns) {
  fb::Segment& segment = *group->segment;
  fb::Counter& taken = segment.taken[group->rank];
  int64_t start = 0;
  do {
    const uint32_t number = taken.value.load() + 1;
    const Status status = fb::wait_for(*group, segment.posted, number, timeout_ns);
    if (status != fb::kDone) return status;
    const int64_t rest = num_bytes - start;
    const int64_t length = rest < fb::kMessageBytes ? rest : fb::kMessageBytes;
    if (length > 0) {
      memcpy(bytes + start, segment.pieces[number % 2].bytes, static_cast<size_t>(length));
    }
    fb::raise(taken, number);
    start += length;
  } while (start < num_bytes);
  return fb::kDone;
}
