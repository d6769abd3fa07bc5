// Rotating new queries and keys to their positions, and writing keys and values into the slots of a cache.
#pragma once

#include "reshape_and_cache.h"

namespace paged::cpu {

// One token's angles stay in the kernel's stack frame.
constexpr int64_t kMaxRotaryDim = 512;

// `cos` and `sin`, rows `[tokens, rotary_dim]`, strides in elements, rotary_dim contiguous.
struct Angles {
  const char *cos, *sin;
  int64_t cos_stride, sin_stride;
  Element element;  // float32, or what the rows are
  int64_t rotary_dim;
  bool interleaved;  // elements 2i and 2i + 1 are one pair; else i and i + rotary_dim / 2
};

// `key.element` is one of the number types, and what all rows are. `rotated` is contiguous.
struct RopeWrite {
  NewRows query;
  char* rotated;  // `[tokens, num_heads, head_dim]`
  int64_t num_heads;
  Angles angles;
  CacheWrite key, value;
};

// Tokens [begin, end) of the call below.
using RotateTokens = void(const RopeWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end);

// Slots are those of reshape_and_cache; the query of a token that has none is rotated all the same.
void rope_and_cache(const RopeWrite& write, const int64_t* slot_mapping);

}  // namespace paged::cpu
