// Rotating new queries and keys to their positions, and writing keys and values into the slots of a cache.
#pragma once

#include "reshape_and_cache.h"

namespace paged::cpu {

// One token's angles stay in the kernel's stack frame.
constexpr int64_t kMaxRotaryDim = 512;

// Tokens [begin, end) of the call below.
using RotateTokens = void(const RopeWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end);

// Slots are those of reshape_and_cache; the query of a token that has none is rotated all the same.
void rope_and_cache(const RopeWrite& write, const int64_t* slot_mapping);

}  // namespace paged::cpu
