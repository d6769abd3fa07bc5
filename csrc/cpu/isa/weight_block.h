// Blocks of a weight, fetched before they are used.
#pragma once

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

PAGED_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// A block of a weight: rows of `size` elements, `stride` apart.
template <class T>
struct Block {
  const T* weight;
  int64_t outputs, size, stride;

  const T* row(int64_t output) const { return weight + output * stride; }
  // No outputs past the end.
  Block part(int64_t first, int64_t count) const { return {row(first), min(count, outputs - first), size, stride}; }
};

// The next block, brought from memory into the second-level cache while this one is used, in the order of addresses.
template <class T>
class NextBlock {
 public:
  explicit NextBlock(const Block<T>& block) : block_(block) {}

  // So many more of its rows.
  void allow(int64_t outputs) { end_ = min(end_ + outputs, block_.outputs); }

  PAGED_INLINED void prefetch() {
    constexpr int kLine = 64 / sizeof(T);
    if (row_ >= end_) return;
    const T* const from = block_.row(row_) + at_;
#pragma GCC unroll 2
    for (int line = 0; line < kChunk; line += kLine) __builtin_prefetch(from + line, 0, 2);
    at_ += kChunk > kLine ? kChunk : kLine;
    if (at_ >= block_.size) at_ = 0, ++row_;
  }

 private:
  Block<T> block_;
  int64_t row_ = 0, at_ = 0, end_ = 0;
};

}  // namespace
}  // namespace paged::PAGED_ISA
