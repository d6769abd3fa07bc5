// The launcher of swap_blocks between a device and the host's memory, over pointers and sizes.
#pragma once
#include <cuda_runtime_api.h>

#include <vector>

#include "../cache_calls.h"

namespace paged::cuda {

struct DeviceStream {
  int device;
  cudaStream_t stream;
};

// Copies on a stream of the current device's own, after what `streams` hold so far and before what they get later. The
// pairs are there on the host and on the current device. Where `wait`, the copies are done when this returns.
cudaError_t launch_swap_blocks(const std::vector<LayerCopy>& layers, const int64_t* host_pairs,
                               const int64_t* device_pairs, int64_t num_pairs, bool wait,
                               const std::vector<DeviceStream>& streams);

}  // namespace paged::cuda
