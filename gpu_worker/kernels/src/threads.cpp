// A pool of threads for loops of a few microseconds and more.
//
// Between two kernels the workers spin for a while, for the next one comes within microseconds
// while a step is computed; then they sleep in the kernel until they are woken. The caller waits
// only for workers that have begun on its loop: one that the system has put aside does not hold up
// a loop whose tasks the others have finished.

#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>

namespace fb {
namespace {

constexpr int kSpins = 4000;  // of a pause each: about 100 us
constexpr int kMaxThreads = 256;

struct Loop {
  void (*task)(void*, int64_t);
  void* context;
  int64_t num_tasks;
};

struct Pool {
  pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER;
  int num_workers = 0;
  Loop loop{};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<uint32_t> generation{0};  // of loops; a futex
  alignas(64) std::atomic<bool> open{false};        // whether `loop` may be joined
  alignas(64) std::atomic<int> num_inside{0};
  alignas(64) std::atomic<int> num_sleeping{0};
  alignas(64) std::atomic<int> num_wanted{0};  // workers above it end
};

Pool pool;
int wanted_threads = 1;

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void work(const Loop& loop) {
  for (;;) {
    const int64_t index = pool.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop.num_tasks) return;
    loop.task(loop.context, index);
  }
}

uint32_t wait_for_change(uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t now = pool.generation.load(std::memory_order_acquire);
    if (now != seen) return now;
    _mm_pause();
  }
  pool.num_sleeping.fetch_add(1);
  uint32_t now;
  while ((now = pool.generation.load()) == seen) futex_wait(pool.generation, seen);
  pool.num_sleeping.fetch_sub(1);
  return now;
}

void* worker(void* argument) {
  const int id = static_cast<int>(reinterpret_cast<intptr_t>(argument));
  uint32_t seen = pool.generation.load();
  for (;;) {
    // The order of these two, against that of the caller's, decides who sees whom: either the
    // caller waits for this worker, or the worker finds the loop closed.
    pool.num_inside.fetch_add(1);
    if (pool.open.load()) work(pool.loop);
    pool.num_inside.fetch_sub(1);
    if (id >= pool.num_wanted.load()) return nullptr;
    seen = wait_for_change(seen);
  }
}

void announce() {
  pool.generation.fetch_add(1);
  if (pool.num_sleeping.load() > 0) futex_wake_all(pool.generation);
}

// A child of fork has one thread, the one that called fork. The others, which may have been
// anywhere in a loop, are gone.
void forget_threads() {
  pthread_mutex_init(&pool.callers, nullptr);
  pool.num_workers = 0;
  pool.open.store(false);
  pool.num_inside.store(0);
  pool.num_sleeping.store(0);
}

// When the library is loaded: the handler must be there before any thread.
const bool is_fork_watched = pthread_atfork(nullptr, nullptr, forget_threads) == 0;

void start_workers() {
  if (!is_fork_watched) return;  // callers compute alone
  const int num_wanted = wanted_threads - 1;
  pool.num_wanted.store(num_wanted);
  if (pool.num_workers > num_wanted) {
    announce();
    pool.num_workers = num_wanted;
  }
  while (pool.num_workers < num_wanted) {
    pthread_t thread;
    void* id = reinterpret_cast<void*>(static_cast<intptr_t>(pool.num_workers));
    if (pthread_create(&thread, nullptr, worker, id) != 0) break;
    pthread_detach(thread);
    ++pool.num_workers;
  }
}

struct Buffer {
  void* memory = nullptr;
  size_t size_bytes = 0;
};

thread_local Buffer buffers[static_cast<int>(Scratch::count)];

}  // namespace

int num_threads() { return wanted_threads; }

void run_tasks(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
  if (num_tasks <= 0) return;
  pthread_mutex_lock(&pool.callers);
  start_workers();
  pool.loop = {task, context, num_tasks};
  pool.next.store(0, std::memory_order_relaxed);
  pool.open.store(true);
  announce();
  work(pool.loop);
  pool.open.store(false);
  while (pool.num_inside.load() != 0) _mm_pause();
  pthread_mutex_unlock(&pool.callers);
}

void* scratch(Scratch slot, size_t size_bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size_bytes < size_bytes) {
    free(buffer.memory);
    buffer.size_bytes = (size_bytes + 4095) / 4096 * 4096;
    if (posix_memalign(&buffer.memory, 64, buffer.size_bytes) != 0) abort();
  }
  return buffer.memory;
}

}  // namespace fb

extern "C" void fb_set_num_threads(int64_t num_threads) {
  if (num_threads < 1) num_threads = 1;
  if (num_threads > fb::kMaxThreads) num_threads = fb::kMaxThreads;
  fb::wanted_threads = static_cast<int>(num_threads);
}
