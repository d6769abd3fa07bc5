// Launches copy_blocks: one launch for all layers whose caches share a layout.
#include <cstring>

#include "copy_blocks.cuh"
#include "launchers.h"

namespace paged::cuda {
namespace {

bool same_layout(const LayerCopy& a, const LayerCopy& b) {
  // Sizes but for the number of blocks, which a block's copy does not depend on.
  return std::memcmp(a.sizes + 1, b.sizes + 1, 3 * sizeof(int64_t)) == 0 &&
         std::memcmp(a.src_strides, b.src_strides, sizeof(a.src_strides)) == 0 &&
         std::memcmp(a.dst_strides, b.dst_strides, sizeof(a.dst_strides)) == 0 && a.element_size == b.element_size &&
         (a.src == a.dst) == (b.src == b.dst);
}

// The largest power of two up to 16 that divides what all addresses of a copy are made of.
int64_t piece_bytes(const BlockCopies& copies, int num_pointers) {
  int64_t steps = 16 | copies.loops.run_bytes | copies.src_block_stride | copies.dst_block_stride;
  for (int dim = 0; dim < 3; ++dim) steps |= copies.loops.src_strides[dim] | copies.loops.dst_strides[dim];
  for (int i = 0; i < num_pointers; ++i) steps |= reinterpret_cast<intptr_t>(copies.pointers[i]);
  return steps & -steps;
}

Element bytes_element(int64_t bytes) {
  switch (bytes) {
    case 1: return Element::kBytes1;
    case 2: return Element::kBytes2;
    case 4: return Element::kBytes4;
    case 8: return Element::kBytes8;
    default: return Element::kBytes16;
  }
}

cudaError_t launch_group(const BlockCopies& copies, int count, const int64_t* block_mapping, int64_t num_pairs,
                         cudaStream_t stream) {
  const int num_pointers = copies.in_place ? count : 2 * count;
  return with_bytes(bytes_element(piece_bytes(copies, num_pointers)), [&](auto zero) {
    copy_blocks_kernel<decltype(zero)>
        <<<dim3(unsigned(num_pairs), unsigned(count)), kCopyThreads, 0, stream>>>(copies, block_mapping);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t launch_copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs,
                               cudaStream_t stream) {
  if (num_pairs == 0) return cudaSuccess;
  if (num_pairs > kMaxGrid) return cudaErrorInvalidConfiguration;
  std::vector<LayerCopy> left = layers;
  while (!left.empty()) {
    const LayerCopy like = left.front();
    std::vector<LayerCopy> others;
    BlockCopies copies{plan_loops(like), like.src_strides[0], like.dst_strides[0], like.src == like.dst, {}};
    char** next = copies.pointers;
    int count = 0;
    for (const LayerCopy& layer : left) {
      if (count == copies.max_caches() || !same_layout(layer, like)) {
        others.push_back(layer);
        continue;
      }
      ++count;
      *next++ = const_cast<char*>(layer.src);
      if (!copies.in_place) *next++ = layer.dst;
    }
    left = others;
    if (const cudaError_t error = launch_group(copies, count, block_mapping, num_pairs, stream)) return error;
  }
  return cudaSuccess;
}

}  // namespace paged::cuda
