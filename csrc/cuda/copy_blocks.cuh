// Copies whole blocks, of all caches that share a layout: a thread block has one pair of one cache.
#pragma once
#include "../cache_calls.h"
#include "row_types.cuh"

namespace paged::cuda {

constexpr int kCopyThreads = 256;
// Of one launch; a kernel's parameters have 4 KB.
constexpr int kMaxPointers = 448;

struct BlockCopies {
  BlockLoops loops;
  int64_t src_block_stride, dst_block_stride;  // bytes
  bool in_place;  // a cache has one pointer, else that of its source and of its destination
  char* pointers[kMaxPointers];

  int max_caches() const { return in_place ? kMaxPointers : kMaxPointers / 2; }
};
static_assert(sizeof(BlockCopies) + 2 * sizeof(int64_t) <= 4096);

// Grid: pairs, caches. `Piece` divides runs, strides and addresses.
template <typename Piece>
__global__ void __launch_bounds__(kCopyThreads)
    copy_blocks_kernel(const __grid_constant__ BlockCopies copies, const int64_t* block_mapping) {
  const BlockLoops& loops = copies.loops;
  const int64_t* const pair = block_mapping + 2 * int64_t(blockIdx.x);
  char* const* const cache = copies.pointers + (copies.in_place ? blockIdx.y : 2 * blockIdx.y);
  const char* const src = cache[0] + pair[0] * copies.src_block_stride;
  char* const dst = cache[copies.in_place ? 0 : 1] + pair[1] * copies.dst_block_stride;
  const int run = int(loops.run_bytes / sizeof(Piece));
  const int count = int(loops.sizes[0] * loops.sizes[1] * loops.sizes[2]) * run;
#pragma unroll 4
  for (int index = threadIdx.x; index < count; index += kCopyThreads) {
    int64_t from = int64_t(index) * sizeof(Piece), to = from;
    if (count != run) {
      int rest = index / run;
      from = to = int64_t(index % run) * sizeof(Piece);
#pragma unroll
      for (int dim = 2; dim >= 0; --dim) {
        const int size = int(loops.sizes[dim]), i = rest % size;
        rest /= size;
        from += i * loops.src_strides[dim];
        to += i * loops.dst_strides[dim];
      }
    }
    *reinterpret_cast<Piece*>(dst + to) = *reinterpret_cast<const Piece*>(src + from);
  }
}

}  // namespace paged::cuda
