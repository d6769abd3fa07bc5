// Attention of one tile of query rows over a range of keys on tensor cores: FlashAttention-2 over paged keys.
#pragma once
#include "attention_epilogue.cuh"
#include "key_walk.cuh"
#include "online_softmax.cuh"
#include "page_loader.cuh"
#include "tile_shape.h"

namespace paged::cuda {

// A warp's part of the tile and, in the layout of the mma's accumulators, its scores and its output.
template <typename T, class Shape>
class WarpTile {
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kStride = Shape::kStride;

 public:
  __device__ WarpTile(const AttentionParams& params, const QueryTile& tile, KeyRange keys, int kv_head)
      : call_(params.call),
        tile_(tile),
        score_rules_(params.call, kv_head),
        bounds_(params.call, tile, keys),
        key_begin_(int(keys.begin)),
        key_end_(int(keys.end)) {
    const int warp = threadIdx.x / kWarpSize;
    lane_ = threadIdx.x % kWarpSize;
    row_warp_ = warp % Shape::kRowWarps;
    key_warp_ = warp / Shape::kRowWarps % Shape::kKeyWarps;
    dim_warp_ = warp / Shape::kRowWarps / Shape::kKeyWarps;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[i][n][j] = 0.0f;
  }

  // Q K^T of this warp's rows and keys.
  __device__ __forceinline__ void dot_products(const T* query, const T* keys) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) scores_[i][n][j] = 0.0f;
    const T* const query_row = query + (row_of_warp() + lane_ % 16) * kStride + lane_ / 16 * 8;
    const T* const key_row = keys + (first_key() + lane_ / 16 * 8 + lane_ % 8) * kStride + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Shape::kDim; k += 16) {
      uint32_t query_fragment[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) ptx::ldmatrix_x4(query_fragment[i], query_row + i * 16 * kStride + k);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t key_fragment[4];
        ptx::ldmatrix_x4(key_fragment, key_row + n * 8 * kStride + k);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16<T>(scores_[i][n], query_fragment[i], key_fragment[0], key_fragment[1]);
          ptx::mma_m16n8k16<T>(scores_[i][n + 1], query_fragment[i], key_fragment[2], key_fragment[3]);
        }
      }
    }
  }

  // From dot products to scores: scale, softcap, ALiBi, mask.
  __device__ __forceinline__ void finish_scores(int key_tile) {
    const bool softcap = score_rules_.softcap_argument != 0.0f;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          scores_[i][n][j] = softcap ? score_rules_.capped(scores_[i][n][j]) : scores_[i][n][j] * score_rules_.scale;

    const int first = key_begin_ + key_tile * Shape::kKeys;
    if (!score_rules_.alibi_slopes && !bounds_.cut(first, Shape::kKeys)) return;
    const int key = first + first_key() + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowRules row(call_, score_rules_, tile_, key_end_, row_of(i, half));
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores_[i][n][2 * half + j];
            score = row.finish(score, key + n * 8 + j);
          }
      }
  }

  // Scores become weights; what was accumulated before is rescaled.
  __device__ __forceinline__ void online_softmax() {
    float factors[kRowTiles][2];
    bool is_unchanged = true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowState& state = states_[i][half];
        float maximum = state.maximum;
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
          maximum = fmaxf(maximum, fmaxf(scores_[i][n][2 * half], scores_[i][n][2 * half + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 2));
        factors[i][half] = state.rescale(maximum);
        is_unchanged = is_unchanged && factors[i][half] == 1.0f;
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) scores_[i][n][j] = state.weight(scores_[i][n][j]);
      }
    if (__all_sync(kFullWarp, is_unchanged)) return;  // most tiles: maxima settle early
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[i][n][j] *= factors[i][j / 2];
  }

  // Adds weights times values of this warp's keys and dimensions.
  __device__ __forceinline__ void accumulate(const T* values) {
    const T* const value_row = values + (first_key() + lane_ % 16) * kStride + first_dim() + lane_ / 16 * 8;
#pragma unroll
    for (int k = 0; k < Shape::kWarpKeys / 16; ++k) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float (&scores)[4] = scores_[i][2 * k + j / 2];
          weights[i][j] = pack<T>(scores[j % 2 * 2], scores[j % 2 * 2 + 1]);
        }
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        uint32_t value_fragment[4];
        ptx::ldmatrix_x4_trans(value_fragment, value_row + k * 16 * kStride + n * 8);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16<T>(out_[i][n], weights[i], value_fragment[0], value_fragment[1]);
          ptx::mma_m16n8k16<T>(out_[i][n + 1], weights[i], value_fragment[2], value_fragment[3]);
        }
      }
    }
  }

  // Hands the unnormalised output over to the epilogue.
  __device__ __forceinline__ void store(const OutStage<Shape>& stage) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowState& state = states_[i][half];
        state.sum += __shfl_xor_sync(kFullWarp, state.sum, 1);
        state.sum += __shfl_xor_sync(kFullWarp, state.sum, 2);
        const int row = row_of(i, half);
        if (lane_ % 4 == 0 && dim_warp_ == 0) *stage.state(key_warp_, row) = make_float2(state.maximum, state.sum);
        float* const target = stage.row(key_warp_, row) + first_dim() + lane_ % 4 * 2;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
          *reinterpret_cast<float2*>(target + n * 8) = make_float2(out_[i][n][2 * half], out_[i][n][2 * half + 1]);
      }
  }

 private:
  static constexpr int kScoreTiles = Shape::kWarpKeys / 8, kOutTiles = Shape::kWarpDim / 8;

  __device__ __forceinline__ int row_of_warp() const { return row_warp_ * 16 * kRowTiles; }
  __device__ __forceinline__ int row_of(int i, int half) const { return row_of_warp() + i * 16 + half * 8 + lane_ / 4; }
  __device__ __forceinline__ int first_key() const { return key_warp_ * Shape::kWarpKeys; }
  __device__ __forceinline__ int first_dim() const { return dim_warp_ * Shape::kWarpDim; }

  const AttentionCall& call_;
  const QueryTile& tile_;
  const ScoreRules score_rules_;
  const MaskBounds bounds_;
  const int key_begin_, key_end_;
  int lane_, row_warp_, key_warp_, dim_warp_;
  RowState states_[kRowTiles][2];
  float scores_[kRowTiles][kScoreTiles][4];
  float out_[kRowTiles][kOutTiles][4];
};

// Grid: tiles of query rows, KV heads, splits of the keys.
template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    attention_tile_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  T* const query = reinterpret_cast<T*>(shared);
  T* const keys = query + Shape::kQueryElements;
  T* const values = keys + Shape::kStages * Shape::kTileElements;

  const QueryTile tile = find_tile(params, Shape::kRows, blockIdx.x);
  if (tile.sequence < 0) return;
  const int kv_head = blockIdx.y, split = blockIdx.z;
  const KeyRange range = keys_of_split<Shape::kKeys>(params, keys_of(params.call, tile), split);

  WarpTile<T, Shape> warp_tile(params, tile, range, kv_head);
  if (range.begin < range.end) {
    load_query<T, Shape::kDim, Shape::kRows, Shape::kThreads>(params, tile, kv_head, query);
    const PageLoader<T, Shape::kDim, Shape::kKeys, Shape::kWarps> loader(params, tile, range, kv_head);
    walk_keys<Shape::kStages, Shape::kTileElements>(
        loader, keys, values,
        [&](int key_tile, const T* key_rows) {
          warp_tile.dot_products(query, key_rows);
          warp_tile.finish_scores(key_tile);
          warp_tile.online_softmax();
        },
        [&](int, const T* value_rows) { warp_tile.accumulate(value_rows); });
  }

  const OutStage<Shape> stage(shared);
  warp_tile.store(stage);
  __syncthreads();
  write_tile<T>(params, tile, kv_head, split, stage);
}

}  // namespace paged::cuda
