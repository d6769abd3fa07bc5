// How memory traffic is divided over threads, and when it goes past their caches.
#pragma once

#include <algorithm>
#include <cstdint>

namespace paged::cpu {

// Waking a thread costs a few microseconds, in which one core copies about this much.
constexpr int64_t kGrainBytes = 64 * 1024;

// Writes of so much go past the caches: lines that are written whole need not be read first. What reads them next pays
// a part of that back. 2 cores of an AMD EPYC, Zen 4, 1,024 tokens of 8 heads of 128 to blocks at random, GB/s read and
// written: float32 24 and, past the caches, 45, bfloat16 23 and 41, where a plain copy takes 32 and 29. Decoding right
// behind it takes 130 and 153 us, both together 357 and 321 us; with half as many tokens 175 us either way.
constexpr int64_t kStreamedBytes = 2 << 20;

// Items of `item_bytes` each that make one thread's smallest share.
inline int64_t grain(int64_t item_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, item_bytes));
}

}  // namespace paged::cpu
