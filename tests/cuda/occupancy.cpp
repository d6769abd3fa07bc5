// Tells how many blocks of the tensor-core attention kernels an SM runs at once: reads lines of device (80, 86, ...),
// head dimension, rows of the tile and registers a thread; writes a number for each.
#include <cuda_occupancy.h>

#include <iostream>
#include <iterator>
#include <map>
#include <utility>

#include "../../csrc/cuda/tile_shape.h"

namespace {

struct Block {
  int threads;
  size_t dynamic_shared;
};
using Blocks = std::map<std::pair<int, int>, Block>;

template <int kDim, int kRows>
void add(Blocks& blocks) {
  if constexpr (paged::cuda::has_tile_rows(kDim, kRows)) {
    using Shape = paged::cuda::TileShape<kDim, kRows>;
    blocks[{kDim, kRows}] = {Shape::kThreads, Shape::kSharedBytes};
  }
}

template <size_t... kIndex>
Blocks tile_blocks(std::index_sequence<kIndex...>) {
  using paged::cuda::kTileDims;
  Blocks blocks;
  (add<kTileDims[kIndex], 16>(blocks), ...);
  (add<kTileDims[kIndex], 32>(blocks), ...);
  (add<kTileDims[kIndex], 64>(blocks), ...);
  (add<kTileDims[kIndex], 128>(blocks), ...);
  return blocks;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; every one has 64 Ki registers.
cudaOccDeviceProp device(int capability) {
  const bool is_small = capability == 86 || capability == 120;
  cudaOccDeviceProp properties;
  properties.computeMajor = capability / 10;
  properties.computeMinor = capability % 10;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiprocessor = is_small ? 1536 : 2048;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 64 * 1024;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = 48 * 1024;
  properties.reservedSharedMemPerBlock = 1024;
  properties.sharedMemPerMultiprocessor = (is_small ? 100 : capability == 80 ? 164 : 228) * 1024;
  properties.sharedMemPerBlockOptin = properties.sharedMemPerMultiprocessor - properties.reservedSharedMemPerBlock;
  properties.numSms = 1;
  return properties;
}

int blocks_per_multiprocessor(int capability, const Block& block, int registers) {
  const cudaOccDeviceProp properties = device(capability);
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = block.threads;
  kernel.numRegs = registers;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = block.dynamic_shared;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel, &state,
                                                                     block.threads, block.dynamic_shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // namespace

int main() {
  const Blocks blocks = tile_blocks(std::make_index_sequence<std::size(paged::cuda::kTileDims)>());
  int capability, dim, rows, registers;
  while (std::cin >> capability >> dim >> rows >> registers)
    std::cout << blocks_per_multiprocessor(capability, blocks.at({dim, rows}), registers) << '\n';
}
