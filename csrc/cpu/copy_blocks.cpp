// Plans copies in the longest runs that are contiguous on both sides, and divides them over the threads.
#include "copy_blocks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../block_loops.h"
#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {
void copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs) {
  CopyBlock* const copy_block = cpu_kernels().copy_block;
  std::vector<BlockLoops> loops;
  int64_t block_bytes = 0, bytes = 0;
  for (const LayerCopy& layer : layers) {
    loops.push_back(plan_loops(layer));
    const int64_t own_bytes = layer.sizes[1] * layer.sizes[2] * layer.sizes[3] * layer.element_size;
    block_bytes = std::max(block_bytes, own_bytes);
    bytes += num_pairs * own_bytes;
  }
  const bool streamed = bytes >= kStreamedBytes;
  const int64_t num_layers = layers.size();
  torch::stable::parallel_for(0, num_layers * num_pairs, grain(block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const LayerCopy& layer = layers[i / num_pairs];
      const int64_t* pair = block_mapping + 2 * (i % num_pairs);
      copy_block(loops[i / num_pairs], layer.src + pair[0] * layer.src_strides[0],
                 layer.dst + pair[1] * layer.dst_strides[0], streamed);
    }
  });
}

}  // namespace paged::cpu
