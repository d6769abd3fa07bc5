// Tells how many blocks of a kernel an SM runs at once: reads lines of device (80, 86, ...), threads and bytes of
// dynamic shared memory a block, and registers a thread; writes a number for each. With an argument it writes the
// shapes of the attention kernels instead: lines of kind, head dimension, rows of the tile and bytes of dynamic shared
// memory.
#include <cuda_occupancy.h>

#include <iostream>
#include <iterator>
#include <utility>

#include "../../csrc/cuda/fma_shape.h"
#include "../../csrc/cuda/tile_shape.h"

namespace {

template <int kDim, int kRows>
void write_tile() {
  if constexpr (paged::cuda::has_tile_rows(kDim, kRows))
    std::cout << "Tile " << kDim << ' ' << kRows << ' ' << paged::cuda::TileShape<kDim, kRows>::kSharedBytes << '\n';
}

template <int kDim, int kRows>
void write_fma() {
  std::cout << "Fma " << kDim << ' ' << kRows << ' ' << paged::cuda::FmaShape<kDim, kRows>::kSharedBytes << '\n';
}

template <size_t... kIndex>
void write_shapes(std::index_sequence<kIndex...>) {
  using paged::cuda::kTileDims;
  (write_tile<kTileDims[kIndex], 16>(), ...);
  (write_tile<kTileDims[kIndex], 32>(), ...);
  (write_tile<kTileDims[kIndex], 64>(), ...);
  (write_tile<kTileDims[kIndex], 128>(), ...);
  write_fma<128, 16>();
  write_fma<128, 32>();
  write_fma<256, 16>();
  write_fma<512, 16>();
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

int blocks_per_multiprocessor(int capability, int threads, size_t dynamic_shared, int registers) {
  const cudaOccDeviceProp properties = device(capability);
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = dynamic_shared;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel, &state, threads, dynamic_shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    write_shapes(std::make_index_sequence<std::size(paged::cuda::kTileDims)>());
    return 0;
  }
  int capability, threads, registers;
  size_t dynamic_shared;
  while (std::cin >> capability >> threads >> dynamic_shared >> registers)
    std::cout << blocks_per_multiprocessor(capability, threads, dynamic_shared, registers) << '\n';
}
