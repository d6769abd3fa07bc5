// Launches merge_attention_states.
#include "launchers.h"
#include "merge_attention_states.cuh"

namespace paged::cuda {

cudaError_t launch_merge_attention_states(const StateMerge& merge, cudaStream_t stream) {
  const int64_t blocks = (merge.num_tokens * merge.num_heads + kMergeStatesWarps - 1) / kMergeStatesWarps;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  return with_number(merge.element, [&](auto zero) {
    merge_attention_states_kernel<decltype(zero)>
        <<<unsigned(blocks), dim3(kWarpSize, kMergeStatesWarps), 0, stream>>>(merge);
    return cudaGetLastError();
  });
}

}  // namespace paged::cuda
