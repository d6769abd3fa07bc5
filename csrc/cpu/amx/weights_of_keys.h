// Weights of a few rows, from [key][row] to tiles of [row][pair of keys].
#pragma once

#include "weigh_keys.h"

namespace paged::PAGED_ISA {
namespace {

// The pair that keys k and k + 16 of 32 are: a vector of weights has 16 / period keys side by side.
PAGED_INLINE int64_t pair_of(int64_t k, int64_t period) {
  const int64_t together = kLanes / period;
  return k % together * period + k / together;
}

// Lane j of v[i] becomes lane i of v[j], within each `size` lanes.
template <int size, int stride = 1>
PAGED_INLINE void transpose_within(Vec* v) {
  if constexpr (stride < size) {
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i)
      if (!(i & stride)) exchange<stride>(v[i], v[i + stride], std::make_integer_sequence<int, kLanes>{});
    transpose_within<size, stride * 2>(v);
  }
}

template <int period>
void pack_weights(const float* weights, int64_t keys, uint32_t* tile) {
  constexpr int together = kLanes / period;
  Vec pairs[period];
#pragma GCC unroll 8
  for (int i = 0; i < period; ++i) {
    const int64_t key = i * together, second = key + kLanes;
    pairs[i] = (Vec)weight_pairs(key < keys ? load(weights + key * period) : Vec{},
                                 second < keys ? load(weights + second * period) : Vec{});
  }
  transpose_within<period>(pairs);
#pragma GCC unroll 8
  for (int r = 0; r < period; ++r) store_as(tile + r * kTileRows, pairs[r]);
}

// Of `keys` keys, at most 32, for 3 rows and more.
static inline void pack_weights(const float* weights, int period, int64_t keys, uint32_t* tile) {
  if (period == 4) return pack_weights<4>(weights, keys, tile);
  pack_weights<8>(weights, keys, tile);
}

}  // namespace
}  // namespace paged::PAGED_ISA
