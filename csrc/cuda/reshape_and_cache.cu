// Launches reshape_and_cache: one thread block a token, one warp a head.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "reshape_and_cache.cuh"

namespace paged {

cudaError_t launch_reshape_and_cache(const ReshapeAndCache& call, cudaStream_t stream) {
  if (call.num_tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(call.num_tokens));
  const dim3 block(kWarpSize, kRowsPerBlock);
  switch (call.type) {
    case ElementType::kFloat32: reshape_and_cache_kernel<float><<<grid, block, 0, stream>>>(call); break;
    case ElementType::kBFloat16: reshape_and_cache_kernel<__nv_bfloat16><<<grid, block, 0, stream>>>(call); break;
    case ElementType::kFloat16: reshape_and_cache_kernel<__half><<<grid, block, 0, stream>>>(call); break;
  }
  return cudaGetLastError();
}

}  // namespace paged
