// Launches reshape_and_cache.
#include "launchers.h"
#include "reshape_and_cache.cuh"

namespace paged::cuda {

cudaError_t launch_reshape_and_cache(const CacheWrite& key, const CacheWrite& value, const int64_t* slot_mapping,
                                     cudaStream_t stream) {
  if (key.num_tokens == 0) return cudaSuccess;
  return with_type(key.element, [&](auto zero) {
    reshape_and_cache_kernel<decltype(zero)>
        <<<unsigned(key.num_tokens), dim3(kWarpSize, kStoreWarps), 0, stream>>>(key, value, slot_mapping);
    return cudaGetLastError();
  });
}

}  // namespace paged::cuda
