// What this processor can do, found out once.

#pragma once

namespace fb {

enum Isa { kNone = 0, kAvx512 = 1, kAmx = 2 };

// The most capable set of instructions that may be used; each includes those before it.
Isa isa();

}  // namespace fb
