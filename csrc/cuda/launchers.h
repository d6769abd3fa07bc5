// The launchers of the ops that move cached rows and blocks, over pointers and sizes.
#pragma once
#include <cuda_runtime_api.h>

#include <vector>

#include "../block_loops.h"
#include "../cache_calls.h"

namespace paged::cuda {

constexpr int64_t kMaxGrid = (int64_t(1) << 31) - 1;

// Token `t` goes to slot `slot_mapping[t]`; -1 skips it. Key and value have one element type.
cudaError_t launch_reshape_and_cache(const CacheWrite& key, const CacheWrite& value, const int64_t* slot_mapping,
                                     cudaStream_t stream);

// The query of a token that has no slot is rotated all the same.
cudaError_t launch_rope_and_cache(const RopeWrite& write, const int64_t* slot_mapping, cudaStream_t stream);

// Key and value have one element type.
cudaError_t launch_gather_cache(const CacheRead& key, const CacheRead& value, const SequenceTable& table,
                                cudaStream_t stream);

cudaError_t launch_merge_attention_states(const StateMerge& merge, cudaStream_t stream);

// `block_mapping` holds `num_pairs` rows of (source, destination) on the device.
cudaError_t launch_copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs,
                               cudaStream_t stream);

}  // namespace paged::cuda
