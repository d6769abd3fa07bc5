// Divides the blocks of a bare read over the threads.
#include "read_blocks.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

int32_t read_blocks(const BlockRead& read) {
  ReadBlocks* const read_some = cpu_kernels().read_blocks;
  std::atomic<int32_t> all{0};
  torch::stable::parallel_for(0, read.count, grain(read.block_bytes),
                              [&](int64_t begin, int64_t end) { all ^= read_some(read, begin, end); });
  return all;
}

}  // namespace paged::cpu
