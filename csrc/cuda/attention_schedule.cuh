// Which query rows and which keys a thread block of attention works on; all of it uniform over the block.
#pragma once
#include "attention_params.h"
#include "elements.cuh"

namespace paged::cuda {

// Some packed rows of one KV head: row r is head `r % group` of the group, of query `r / group`.
struct QueryTile {
  int64_t sequence;  // -1: the block has nothing to do
  int64_t query_begin;
  int first_row, num_rows;  // of the tile, within the sequence's rows
  int query_len, seq_len, group;
};

__device__ __forceinline__ int64_t rows_of_sequence(const AttentionParams& params, int64_t sequence) {
  const AttentionCall& call = params.call;
  const int64_t queries = call.cu_seqlens_q[sequence + 1] - call.cu_seqlens_q[sequence];
  const int64_t rows = queries * (call.num_heads / call.num_kv_heads);
  return rows > params.min_rows && rows <= params.max_rows ? rows : 0;
}

__device__ __forceinline__ QueryTile tile_of(const AttentionParams& params, int tile_rows, int64_t sequence,
                                             int64_t index) {
  const AttentionCall& call = params.call;
  const int64_t rows = rows_of_sequence(params, sequence);
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  if (index >= tiles) return {-1};
  // Under a causal mask the last rows see the most keys: they start first.
  const int64_t first_row = (tiles - 1 - index) * tile_rows;
  const int64_t query_begin = call.cu_seqlens_q[sequence];
  return {sequence,
          query_begin,
          int(first_row),
          int(rows - first_row < tile_rows ? rows - first_row : tile_rows),
          int(call.cu_seqlens_q[sequence + 1] - query_begin),
          call.seq_lens[sequence],
          int(call.num_heads / call.num_kv_heads)};
}

// Tile `tile` of the launch, of up to `tile_rows` rows. Every warp adds up the sequences' tiles by itself, 32 at a
// time.
__device__ __forceinline__ QueryTile find_tile(const AttentionParams& params, int tile_rows, int64_t tile) {
  if (params.one_tile_a_sequence) return tile_of(params, tile_rows, tile, 0);
  const int lane = threadIdx.x % kWarpSize;
  int64_t before = 0;
  for (int64_t first = 0; first < params.call.num_seqs; first += kWarpSize) {
    const int64_t sequence = first + lane;
    const int own =
        sequence < params.call.num_seqs ? int((rows_of_sequence(params, sequence) + tile_rows - 1) / tile_rows) : 0;
    int up_to = own;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, up_to, step);
      if (lane >= step) up_to += other;
    }
    const unsigned reached = __ballot_sync(kFullWarp, before + up_to > tile);
    if (reached) {
      const int owner = __ffs(reached) - 1;
      const int64_t before_owner = before + __shfl_sync(kFullWarp, up_to - own, owner);
      return tile_of(params, tile_rows, first + owner, tile - before_owner);
    }
    before += __shfl_sync(kFullWarp, up_to, kWarpSize - 1);
  }
  return {-1};
}

__device__ __forceinline__ int position_of(const QueryTile& tile, int row) {
  return tile.seq_len - tile.query_len + (tile.first_row + row) / tile.group;
}

// Where a row of the tile lies among the call's `num_tokens * num_heads` rows.
__device__ __forceinline__ int64_t output_row(const AttentionCall& call, const QueryTile& tile, int kv_head, int row) {
  const int packed = tile.first_row + row;
  return (tile.query_begin + packed / tile.group) * call.num_heads + int64_t(kv_head) * tile.group +
         packed % tile.group;
}

// Where a split's part of a row of this block's tile lies. The kernels that write parts and that merge them have the
// same tiles and KV heads in the first two dimensions of their grids.
__device__ __forceinline__ int64_t partial_row(const AttentionParams& params, int split, int row) {
  const int64_t tile = (int64_t(split) * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y;
  return tile * params.tile_rows + row;
}

// Keys that any row of the tile sees.
__device__ __forceinline__ KeyRange keys_of(const AttentionCall& call, const QueryTile& tile) {
  const int64_t first = position_of(tile, 0);
  return visible_keys(call, first, position_of(tile, tile.num_rows - 1) - first + 1, tile.seq_len);
}

// The part of `keys` that belongs to one split, in whole tiles of `kKeys`; the last split takes the rest.
template <int kKeys>
__device__ __forceinline__ KeyRange keys_of_split(const AttentionParams& params, KeyRange keys, int split) {
  const int64_t count = keys.end - keys.begin;
  int64_t parts = params.num_splits;
  if (params.deterministic) {
    parts = (count + kDeterministicSplit - 1) / kDeterministicSplit;
    if (parts > kMaxDeterministicSplits) parts = kMaxDeterministicSplits;
    if (parts < 1) parts = 1;
  }
  const int64_t part = ((count + parts - 1) / parts + kKeys - 1) / kKeys * kKeys;
  const int64_t begin = keys.begin + split * part;
  if (begin >= keys.end) return {keys.end, keys.end};
  const bool is_last = split == params.num_splits - 1 || begin + part >= keys.end;
  return {begin, is_last ? keys.end : begin + part};
}

}  // namespace paged::cuda
