// Looks at the values of tables, lengths and slots where they are: on the device.
#pragma once
#include <cuda_runtime_api.h>

#include "../attention_call.h"
#include "../cache_calls.h"

namespace paged::cuda {

// What each launch sets to 1 where it finds a bad value, and to 0 otherwise: `verdict`, on the device.

struct AttentionTables {
  AttentionCall call;
  int64_t num_blocks, max_blocks, max_query_len;
};
cudaError_t launch_check_attention(const AttentionTables& tables, int32_t* verdict, cudaStream_t stream);

struct GatheredTables {
  SequenceTable table;
  int64_t num_blocks, max_blocks, block_size, max_seq_len;
};
cudaError_t launch_check_gather(const GatheredTables& tables, int32_t* verdict, cudaStream_t stream);

// Slots outside of [-1, num_slots).
cudaError_t launch_check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots, int32_t* verdict,
                               cudaStream_t stream);

// Pairs whose source is outside of [0, src_blocks) or whose destination is outside of [0, dst_blocks).
cudaError_t launch_check_pairs(const int64_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks,
                               int32_t* verdict, cudaStream_t stream);

}  // namespace paged::cuda
