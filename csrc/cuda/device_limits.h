// How many blocks of a kernel the current device runs at once.
#pragma once
#include <cuda_runtime_api.h>

namespace paged::cuda {

// Asks the driver once per kernel and device, and lets the kernel have its shared memory.
cudaError_t blocks_at_once(const void* kernel, int threads, int shared_bytes, int& blocks);

}  // namespace paged::cuda
