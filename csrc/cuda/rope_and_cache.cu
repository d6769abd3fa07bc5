// Launches rope_and_cache.
#include "launchers.h"
#include "rope_and_cache.cuh"

namespace paged::cuda {

cudaError_t launch_rope_and_cache(const RopeWrite& write, const int64_t* slot_mapping, cudaStream_t stream) {
  if (write.key.num_tokens == 0) return cudaSuccess;
  return with_number(write.key.element, [&](auto zero) {
    using T = decltype(zero);
    const dim3 block(kWarpSize, kStoreWarps);
    const unsigned tokens = unsigned(write.key.num_tokens);
    if (write.angles.element == Element::kFloat32)
      rope_and_cache_kernel<T, float><<<tokens, block, 0, stream>>>(write, slot_mapping);
    else
      rope_and_cache_kernel<T, T><<<tokens, block, 0, stream>>>(write, slot_mapping);
    return cudaGetLastError();
  });
}

}  // namespace paged::cuda
