// The memory that the ranks of a tensor-parallel group share, and how they wait for each other.
//
// All that happens in it are numbers that one rank raises and others wait for. A wait spins for
// some microseconds, then offers the core to whoever else wants it, then sleeps in the kernel, and
// looks up now and then whether the other ranks are still there.
//
// All ranks call the same collectives in the same order. One that failed leaves the group broken:
// nothing but leaving may follow.

#pragma once

#include <poll.h>

#include <atomic>
#include <cstdint>

namespace fb {

constexpr int kMaxRanks = 64;
constexpr int64_t kSlotBytes = 256 << 10;
constexpr int64_t kMessageBytes = 256 << 10;

enum Status : int32_t { kDone = 0, kTimedOut = 1, kPeerGone = 2, kBroken = 3 };

// Two lines of the cache each: processors fetch them in pairs.
struct alignas(128) Counter {
  std::atomic<uint32_t> value;  // a futex; it wraps around
  std::atomic<uint32_t> num_sleeping;
};

struct alignas(128) MessagePiece {
  int64_t message_bytes;  // of the whole message
  alignas(64) unsigned char bytes[kMessageBytes];
};

// Fresh memory is all zeros, which is how a group begins.
struct Segment {
  std::atomic<uint32_t> broken;
  Counter arrived[kMaxRanks];  // collectives that each rank has entered
  Counter posted;              // pieces of messages that rank 0 has written
  Counter taken[kMaxRanks];    // and each rank has read
  MessagePiece pieces[2];
  // Two slots for each rank follow.
};

// One rank's end of the group.
struct Group {
  Segment* segment;
  int rank, size;
  uint32_t phase;        // collectives entered; one may take several
  uint32_t exchange;     // uses of the slots
  uint32_t last_gather;  // its phase
  int num_peers;
  pollfd peers[kMaxRanks];  // become readable when the process at the other end is gone
};

inline bool has_reached(const Counter& counter, uint32_t goal) {
  return static_cast<int32_t>(counter.value.load(std::memory_order_acquire) - goal) >= 0;
}

// Raises a number that only this rank writes, and wakes who sleeps on it.
void raise(Counter& counter, uint32_t value);

// Waits until `counter` is at least `goal`; a negative timeout never passes.
Status wait_for(Group& group, Counter& counter, uint32_t goal, int64_t timeout_ns);

// Waits until every other rank has entered the collective of `phase`.
Status wait_for_all(Group& group, uint32_t phase, int64_t timeout_ns);

// Enters the next collective: what this rank wrote before is seen by all who wait for it.
uint32_t enter(Group& group);

// Where `rank` puts what it gives to an exchange. There are two slots each, in turns: who enters
// an exchange has read all of the one before it, so that the slot of the one before that is free.
unsigned char* slot(Group& group, int rank, uint32_t exchange);

}  // namespace fb
