// Merges the splits of attention rows by their log-sum-exp; Flash-Decoding's second step.
#pragma once
#include "attention_epilogue.cuh"

namespace paged::cuda {

constexpr int kMergeWarps = 4;

// One row of this block's tile, one warp. Splits that saw nothing are not read.
template <typename T>
__device__ __forceinline__ void merge_row(const AttentionParams& params, int tile_row, int64_t row) {
  const AttentionCall& call = params.call;
  const int lane = threadIdx.x % kWarpSize;
  float maximum = -INFINITY;
  for (int split = lane; split < params.num_splits; split += kWarpSize)
    maximum = fmaxf(maximum, params.partial_lse[partial_row(params, split, tile_row)]);
#pragma unroll
  for (int step = kWarpSize / 2; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, step));
  const float finite = RowState::finite(maximum);
  float sum = 0.0f;
  for (int split = lane; split < params.num_splits; split += kWarpSize)
    sum += ptx::exp2_approx(params.partial_lse[partial_row(params, split, tile_row)] - finite);
#pragma unroll
  for (int step = kWarpSize / 2; step; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);

  const int64_t head = row % call.num_heads;
  float lse2 = sum == 0 ? -INFINITY : maximum + ptx::log2_approx(sum);
  const float factor = add_sink(call, head, lse2);
  if (call.lse && lane == 0) call.lse[head * call.num_tokens + row / call.num_heads] = lse2 * kLn2;

  constexpr int kCount = 4;
  for (int first = lane * kCount; first < call.v_head_dim; first += kWarpSize * kCount) {
    float values[kCount] = {};
    for (int split = 0; split < params.num_splits; ++split) {
      const int64_t partial = partial_row(params, split, tile_row);
      const float weight = ptx::exp2_approx(params.partial_lse[partial] - finite);
      if (weight == 0.0f) continue;
      const float4 part = *reinterpret_cast<const float4*>(params.partial_out + partial * call.v_head_dim + first);
      const float share = weight / sum;
      values[0] += share * part.x;
      values[1] += share * part.y;
      values[2] += share * part.z;
      values[3] += share * part.w;
    }
    T* const target = static_cast<T*>(call.out) + row * call.v_head_dim + first;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    store_row(target, values);
  }
}

// Grid: the launch's tiles, KV heads, and the tile's rows by `kMergeWarps`.
template <typename T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    attention_merge_kernel(const __grid_constant__ AttentionParams params, int tile_rows) {
  const QueryTile tile = find_tile(params, tile_rows, blockIdx.x);
  if (tile.sequence < 0) return;
  const int row = blockIdx.z * kMergeWarps + threadIdx.x / kWarpSize;
  if (row < tile.num_rows) merge_row<T>(params, row, output_row(params.call, tile, blockIdx.y, row));
}

}  // namespace paged::cuda
