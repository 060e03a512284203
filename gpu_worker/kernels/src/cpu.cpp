// Finding out what the processor and the system allow.

#include "cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fb {
namespace {

constexpr long kArchReqXcompPerm = 0x1023;
constexpr long kXfeatureTileData = 18;

Isa current = kNone;

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf leaf(unsigned number, unsigned sub) {
  Leaf found;
  __get_cpuid_count(number, sub, &found.a, &found.b, &found.c, &found.d);
  return found;
}

bool has(unsigned word, int bit) { return word >> bit & 1; }

unsigned long long enabled_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

Isa detect() {
  const Leaf basic = leaf(1, 0), extended = leaf(7, 0);
  const bool saves_state = has(basic.c, 27);
  if (!saves_state || (enabled_state() & 0xe6) != 0xe6) return kNone;
  const bool has_avx512 = has(extended.b, 16) && has(extended.b, 17) && has(extended.b, 30) &&
                          has(extended.b, 31) && has(extended.c, 11) && has(basic.c, 12) &&
                          has(basic.c, 29);
  if (!has_avx512) return kNone;
  const bool has_amx = has(extended.d, 22) && has(extended.d, 24) && has(extended.d, 25) &&
                       has(leaf(7, 1).a, 5);
  // Tiles are a large state, which a process must ask the system for.
  if (!has_amx || syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0) {
    return kAvx512;
  }
  return kAmx;
}

}  // namespace

Isa isa() { return current; }

}  // namespace fb

// Allows instruction sets up to `most`, and returns the one that is used.
extern "C" int fb_initialize(int most) {
  const fb::Isa found = fb::detect();
  fb::current = found < most ? found : static_cast<fb::Isa>(most);
  return fb::current;
}
