// Weighs two attention outputs by exp(lse), a warp a row; a side with lse -inf saw no key and is not read.
#pragma once
#include "online_softmax.cuh"
#include "row_types.cuh"

namespace paged::cuda {

constexpr int kMergeStatesWarps = 4;

__device__ __forceinline__ float lse_of(const AttentionState& state, int64_t token, int64_t head) {
  return state.lse[head * state.lse_head_stride + token * state.lse_token_stride];
}

template <typename T>
__device__ __forceinline__ const T* row_of(const AttentionState& state, int64_t token, int64_t head) {
  return reinterpret_cast<const T*>(state.out) + token * state.token_stride + head * state.head_stride;
}

template <typename T>
__global__ void __launch_bounds__(kMergeStatesWarps* kWarpSize)
    merge_attention_states_kernel(const __grid_constant__ StateMerge merge) {
  const int64_t row = int64_t(blockIdx.x) * kMergeStatesWarps + threadIdx.y;
  if (row >= merge.num_tokens * merge.num_heads) return;
  const int64_t token = row / merge.num_heads, head = row % merge.num_heads;
  const float lse_a = lse_of(merge.a, token, head), lse_b = lse_of(merge.b, token, head);
  const float largest = fmaxf(lse_a, lse_b), finite = RowState::finite(largest);
  const float part_a = ptx::exp2_approx((lse_a - finite) * kLog2E);
  const float part_b = ptx::exp2_approx((lse_b - finite) * kLog2E);
  const float total = part_a + part_b;
  const float weight_a = total == 0 ? 0 : part_a / total, weight_b = total == 0 ? 0 : part_b / total;
  const T* const from_a = row_of<T>(merge.a, token, head);
  const T* const from_b = row_of<T>(merge.b, token, head);
  T* const to = reinterpret_cast<T*>(merge.out) + row * merge.head_dim;
  for (int64_t i = threadIdx.x; i < merge.head_dim; i += kWarpSize) {
    // A weight of 0 keeps NaN out.
    const float a = weight_a != 0 ? weight_a * to_float(from_a[i]) : 0;
    to[i] = from_float<T>(weight_b != 0 ? a + weight_b * to_float(from_b[i]) : a);
  }
  if (threadIdx.x == 0)
    merge.lse[head * merge.num_tokens + token] = total == 0 ? -INFINITY : largest + ptx::log2_approx(total) * kLn2;
}

}  // namespace paged::cuda
