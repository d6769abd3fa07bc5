// The launcher of attention, over pointers and sizes.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention_kernels.h"
#include "attention_params.h"

namespace paged::cuda {

struct AttentionRequest {
  AttentionCall call;
  Element type;           // kFloat32, kBFloat16 or kFloat16
  int64_t max_query_len;  // no sequence has more query rows
  int64_t max_seq_len;    // a bound on the lengths, for the number of splits alone
  int64_t num_splits;     // 0 chooses
  bool deterministic;
};

// One launch per class of sequences by their number of packed rows.
struct AttentionLaunch {
  AttentionKernel kernel;
  AttentionParams params;
  int64_t tiles;
};

struct AttentionPlan {
  static constexpr int kMaxLaunches = 3;
  AttentionLaunch launches[kMaxLaunches];
  int num_launches = 0;
  Element type;
  int64_t workspace_floats = 0;
};

// Decides from sizes alone, so that a captured CUDA graph serves any lengths. Uses the current device.
cudaError_t plan_attention(const AttentionRequest& request, AttentionPlan& plan);

// `workspace` has the plan's size, 16-byte aligned.
cudaError_t launch_attention(const AttentionPlan& plan, float* workspace, cudaStream_t stream);

}  // namespace paged::cuda
