// How much memory traffic one thread should get at least.
#pragma once

#include <algorithm>
#include <cstdint>

namespace paged::cpu {

// Waking a thread costs a few microseconds, in which one core copies about this much.
constexpr int64_t kGrainBytes = 64 * 1024;

// Items of `item_bytes` each that make one thread's smallest share.
inline int64_t grain(int64_t item_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, item_bytes));
}

}  // namespace paged::cpu
