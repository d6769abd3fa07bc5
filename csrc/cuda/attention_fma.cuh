// Attention of one tile of float32 query rows over a range of keys by fused multiply-adds.
#pragma once
#include "attention_epilogue.cuh"
#include "fma_shape.h"
#include "key_walk.cuh"
#include "online_softmax.cuh"
#include "page_loader.cuh"

namespace paged::cuda {

template <class Shape>
class LaneTile {
  static constexpr int kRowLanes = Shape::kRowLanes;
  static_assert(Shape::kStride == SharedRows<float, Shape::kDim>::kStride);

 public:
  __device__ LaneTile(const AttentionParams& params, const QueryTile& tile, KeyRange keys, int kv_head)
      : score_rules_(params.call, kv_head),
        row_rules_(params.call, score_rules_, tile, int(keys.end), threadIdx.x / kRowLanes),
        head_dim_(int(params.call.head_dim)),
        key_begin_(int(keys.begin)) {
#pragma unroll
    for (int c = 0; c < kPieces; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[c][i] = 0.0f;
  }

  __device__ __forceinline__ int row() const { return threadIdx.x / kRowLanes; }
  // The first of 4 neighbouring dimensions of the output.
  __device__ __forceinline__ int first(int piece) const { return (piece * kRowLanes + lane()) * 4; }

  __device__ __forceinline__ void weigh(int key_tile, const float* query, const float* keys, float* weights) {
    float scores[kLaneKeys] = {};
    const float* const query_row = query + row() * Shape::kStride;
#pragma unroll 4
    for (int d = 0; d < head_dim_; d += 4) {
      const float4 q = *reinterpret_cast<const float4*>(query_row + d);
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(keys + (j * kRowLanes + lane()) * Shape::kStride + d);
        scores[j] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
      }
    }
    const int first_key = key_begin_ + key_tile * Shape::kKeys + lane();
    float maximum = state_.maximum;
#pragma unroll
    for (int j = 0; j < kLaneKeys; ++j) {
      const float score =
          score_rules_.softcap_argument != 0.0f ? score_rules_.capped(scores[j]) : scores[j] * score_rules_.scale;
      scores[j] = row_rules_.finish(score, first_key + j * kRowLanes);
      maximum = fmaxf(maximum, scores[j]);
    }
#pragma unroll
    for (int step = 1; step < kRowLanes; step *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, step));
    const float factor = state_.rescale(maximum);
    float* const weight_row = weights + row() * Shape::kWeightStride;
#pragma unroll
    for (int j = 0; j < kLaneKeys; ++j) weight_row[j * kRowLanes + lane()] = state_.weight(scores[j]);
#pragma unroll
    for (int c = 0; c < kPieces; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[c][i] *= factor;
    __syncwarp();
  }

  __device__ __forceinline__ void accumulate(const float* values, const float* weights) {
    const float* const weight_row = weights + row() * Shape::kWeightStride;
#pragma unroll 4
    for (int key = 0; key < Shape::kKeys; ++key) {
      const float weight = weight_row[key];
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        const float4 v = *reinterpret_cast<const float4*>(values + key * Shape::kStride + first(c));
        out_[c][0] += weight * v.x;
        out_[c][1] += weight * v.y;
        out_[c][2] += weight * v.z;
        out_[c][3] += weight * v.w;
      }
    }
  }

  __device__ __forceinline__ void write(const AttentionParams& params, const QueryTile& tile, int kv_head, int split) {
#pragma unroll
    for (int step = 1; step < kRowLanes; step *= 2) state_.sum += __shfl_xor_sync(kFullWarp, state_.sum, step);
    if (row() >= tile.num_rows) return;
    const float factor = state_.sum == 0 ? 0.0f : stored_scale(params.call.value_scale, kv_head) / state_.sum;
    const float lse2 = state_.sum == 0 ? -INFINITY : state_.maximum + log2f(state_.sum);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[c][i] *= factor;
      if (first(c) < params.call.v_head_dim)
        write_row<float>(params, tile, kv_head, split, row(), first(c), lse2, out_[c]);
    }
  }

 private:
  static constexpr int kLaneKeys = Shape::kKeys / kRowLanes, kPieces = Shape::kDim / (4 * kRowLanes);

  __device__ __forceinline__ int lane() const { return threadIdx.x % kRowLanes; }

  const ScoreRules score_rules_;
  const RowRules row_rules_;
  const int head_dim_, key_begin_;
  RowState state_;
  float out_[kPieces][4];
};

// Grid: tiles of query rows, KV heads, splits of the keys.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    attention_fma_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) float shared_floats[];
  float* const query = shared_floats;
  float* const keys = query + Shape::kRows * Shape::kStride;
  float* const values = keys + Shape::kStages * Shape::kTileElements;
  float* const weights = values + Shape::kStages * Shape::kTileElements;

  const QueryTile tile = find_tile(params, Shape::kRows, blockIdx.x);
  if (tile.sequence < 0) return;
  const int kv_head = blockIdx.y, split = blockIdx.z;
  const KeyRange range = keys_of_split<Shape::kKeys>(params, keys_of(params.call, tile), split);

  LaneTile<Shape> lane_tile(params, tile, range, kv_head);
  if (range.begin < range.end) {
    load_query<float, Shape::kDim, Shape::kRows, Shape::kThreads>(params, tile, kv_head, query);
    const PageLoader<float, Shape::kDim, Shape::kKeys, Shape::kWarps> loader(params, tile, range, kv_head);
    walk_keys<Shape::kStages, Shape::kTileElements>(
        loader, keys, values,
        [&](int key_tile, const float* key_rows) { lane_tile.weigh(key_tile, query, key_rows, weights); },
        [&](int, const float* value_rows) { lane_tile.accumulate(value_rows, weights); });
  }
  lane_tile.write(params, tile, kv_head, split);
}

}  // namespace paged::cuda
