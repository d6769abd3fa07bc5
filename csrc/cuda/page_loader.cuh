// Brings tiles of cached keys and values, and the query rows, into shared memory; what lies outside becomes zero.
#pragma once
#include "attention_schedule.cuh"
#include "ptx.cuh"

namespace paged::cuda {

// Rows of `kDim` elements in shared memory. An odd number of 16-byte pieces a row keeps ldmatrix, and float4 reads of
// neighbouring rows, free of bank conflicts.
template <typename T, int kDim>
struct SharedRows {
  static constexpr int kPieces = kDim * int(sizeof(T)) / 16;
  static constexpr int kPieceElements = 16 / int(sizeof(T));
  static constexpr int kStride = kDim + kPieceElements;  // elements
  static_assert(kPieces % 2 == 0);

  static __host__ __device__ constexpr int bytes(int rows) { return rows * kStride * int(sizeof(T)); }
};

// One KV head of a key or value cache; strides in elements.
template <typename T>
struct HeadOfCache {
  const T* data;
  int64_t block_stride, token_stride, dim_stride;
  int dim;
  bool in_16_bytes;
};

// Tiles of `kKeys` tokens of one sequence's range of keys. Each warp brings `kKeys / kWarps` neighbouring tokens; each
// of its first lanes looks up where one of them lies and tells the others by a shuffle, so that the block size does
// not matter.
template <typename T, int kDim, int kKeys, int kWarps>
class PageLoader {
  using Rows = SharedRows<T, kDim>;
  static constexpr int kRowsOfWarp = kKeys / kWarps;
  static constexpr int kPiecesOfWarp = kRowsOfWarp * Rows::kPieces;
  static_assert(kRowsOfWarp <= kWarpSize && kRowsOfWarp * kDim % kWarpSize == 0);

 public:
  __device__ PageLoader(const AttentionParams& params, const QueryTile& tile, KeyRange keys, int kv_head)
      : params_(params),
        table_(params.call.block_table + tile.sequence * params.call.table_stride),
        kv_head_(kv_head),
        begin_(int(keys.begin)),
        end_(int(keys.end)) {}

  __device__ __forceinline__ int num_tiles() const { return (end_ - begin_ + kKeys - 1) / kKeys; }

  // The block of this lane's token in a tile, or -1 outside of the range.
  __device__ __forceinline__ int block_of(int tile) const {
    const int token = token_of(tile);
    return token < end_ ? __ldg(table_ + (token >> params_.log2_block_size)) : -1;
  }

  __device__ __forceinline__ void load_keys(int tile, int block, T* shared) const {
    const AttentionCall& call = params_.call;
    load({static_cast<const T*>(call.key_cache) + kv_head_ * call.key.head, call.key.block, call.key.token,
          call.key.dim, int(call.head_dim), params_.key_in_16_bytes},
         tile, block, shared);
  }

  __device__ __forceinline__ void load_values(int tile, int block, T* shared) const {
    const AttentionCall& call = params_.call;
    load({static_cast<const T*>(call.value_cache) + kv_head_ * call.value.head, call.value.block, call.value.token, 1,
          int(call.v_head_dim), params_.value_in_16_bytes},
         tile, block, shared);
  }

 private:
  __device__ __forceinline__ int token_of(int tile) const {
    const int row = threadIdx.x % kWarpSize % kRowsOfWarp + threadIdx.x / kWarpSize * kRowsOfWarp;
    return begin_ + tile * kKeys + row;
  }

  __device__ __forceinline__ void load(const HeadOfCache<T>& cache, int tile, int block, T* shared) const {
    const int lane = threadIdx.x % kWarpSize;
    const int offset = token_of(tile) & (int(params_.call.block_size) - 1);
    const int64_t place = block < 0 ? -1 : block * cache.block_stride + offset * cache.token_stride;
    T* const target = shared + threadIdx.x / kWarpSize * kRowsOfWarp * Rows::kStride;
    if (cache.in_16_bytes) {
#pragma unroll
      for (int first = 0; first < kPiecesOfWarp; first += kWarpSize) {
        const int index = first + lane;
        const int row = index / Rows::kPieces, element = index % Rows::kPieces * Rows::kPieceElements;
        const int64_t place_of_row = __shfl_sync(kFullWarp, place, row);
        const bool is_there = place_of_row >= 0 && element < cache.dim;
        if (first + kWarpSize <= kPiecesOfWarp || index < kPiecesOfWarp)
          ptx::cp_async_16(target + row * Rows::kStride + element, cache.data + (is_there ? place_of_row + element : 0),
                           is_there ? 16 : 0);
      }
    } else {
      // Neighbouring lanes take neighbouring tokens, which a transposed block has side by side.
#pragma unroll 4
      for (int index = lane; index < kRowsOfWarp * kDim; index += kWarpSize) {
        const int row = index % kRowsOfWarp, element = index / kRowsOfWarp;
        const int64_t place_of_row = __shfl_sync(kFullWarp, place, row);
        const bool is_there = place_of_row >= 0 && element < cache.dim;
        target[row * Rows::kStride + element] =
            is_there ? cache.data[place_of_row + element * cache.dim_stride] : from_float<T>(0.0f);
      }
    }
  }

  const AttentionParams& params_;
  const int32_t* const table_;
  const int kv_head_, begin_, end_;
};

// The packed query rows of a tile; rows past its end become zero.
template <typename T, int kDim, int kRows, int kThreads>
__device__ __forceinline__ void load_query(const AttentionParams& params, const QueryTile& tile, int kv_head,
                                           T* shared) {
  using Rows = SharedRows<T, kDim>;
  const AttentionCall& call = params.call;
  const int head_dim = int(call.head_dim);
  const T* const query = static_cast<const T*>(call.query) + tile.query_begin * call.query_token_stride +
                         int64_t(kv_head) * tile.group * call.query_head_stride;
#pragma unroll 4
  for (int index = threadIdx.x; index < kRows * Rows::kPieces; index += kThreads) {
    const int row = index / Rows::kPieces, element = index % Rows::kPieces * Rows::kPieceElements;
    const int packed = tile.first_row + row;
    const bool is_there = row < tile.num_rows && element < head_dim;
    const T* const source = query + (is_there ? packed / tile.group * call.query_token_stride +
                                                    packed % tile.group * call.query_head_stride + element
                                              : 0);
    T* const target = shared + row * Rows::kStride + element;
    if (params.query_in_16_bytes) {
      ptx::cp_async_16(target, source, is_there ? 16 : 0);
    } else {
#pragma unroll
      for (int i = 0; i < Rows::kPieceElements; ++i) target[i] = is_there ? source[i] : from_float<T>(0.0f);
    }
  }
}

}  // namespace paged::cuda
