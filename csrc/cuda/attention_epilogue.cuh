// The end of an attention tile: merges the warps that had different keys, normalises, and writes.
#pragma once
#include "online_softmax.cuh"

namespace paged::cuda {

// Unnormalised output rows in float32 and each row's (maximum, sum), one set per warp of keys, in shared memory.
template <class Shape>
class OutStage {
 public:
  static constexpr int kSets = Shape::kKeyWarps, kRows = Shape::kRows, kDim = Shape::kDim;
  static constexpr int kThreads = Shape::kThreads;

  __device__ explicit OutStage(unsigned char* shared) : data_(reinterpret_cast<float*>(shared)) {}

  __device__ __forceinline__ float* row(int set, int row) const {
    return data_ + (set * kRows + row) * Shape::kOutStride;
  }

  __device__ __forceinline__ float2* state(int set, int row) const {
    return reinterpret_cast<float2*>(data_ + kSets * kRows * Shape::kOutStride) + set * kRows + row;
  }

 private:
  float* const data_;
};

// Row `tile_row` of the tile, or one split's part of it, 4 or 8 neighbouring elements from `first` on.
template <typename T, int kCount>
__device__ __forceinline__ void write_row(const AttentionParams& params, const QueryTile& tile, int kv_head, int split,
                                          int tile_row, int first, float lse2, float (&values)[kCount]) {
  const AttentionCall& call = params.call;
  if (params.num_splits == 1) {
    const int64_t row = output_row(call, tile, kv_head, tile_row);
    const int64_t head = row % call.num_heads;
    const float factor = add_sink(call, head, lse2);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    store_row(static_cast<T*>(call.out) + row * call.v_head_dim + first, values);
    if (call.lse && first == 0) call.lse[head * call.num_tokens + row / call.num_heads] = lse2 * kLn2;
    return;
  }
  const int64_t partial = partial_row(params, split, tile_row);
  float* const target = params.partial_out + partial * call.v_head_dim + first;
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    *reinterpret_cast<float4*>(target + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  if (first == 0) params.partial_lse[partial] = lse2;
}

template <typename T, class Stage>
__device__ __forceinline__ void write_tile(const AttentionParams& params, const QueryTile& tile, int kv_head, int split,
                                           const Stage& stage) {
  constexpr int kCount = 8, kPieces = Stage::kDim / kCount;
  const float value_scale = stored_scale(params.call.value_scale, kv_head);
  for (int index = threadIdx.x; index < tile.num_rows * kPieces; index += Stage::kThreads) {
    const int row = index / kPieces, first = index % kPieces * kCount;
    if (first >= params.call.v_head_dim) continue;
    RowState all;
#pragma unroll
    for (int set = 0; set < Stage::kSets; ++set) all.maximum = fmaxf(all.maximum, stage.state(set, row)->x);
    float values[kCount] = {};
#pragma unroll
    for (int set = 0; set < Stage::kSets; ++set) {
      const float2 state = *stage.state(set, row);
      const float weight = ptx::exp2_approx(state.x - RowState::finite(all.maximum));
      all.sum += weight * state.y;
      const float* const source = stage.row(set, row) + first;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += weight * source[i];
    }
    const float factor = all.sum == 0 ? 0.0f : value_scale / all.sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    write_row<T>(params, tile, kv_head, split, row, first, all.lse2(), values);
  }
}

}  // namespace paged::cuda
