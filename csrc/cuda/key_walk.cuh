// The walk over a range of keys, tile by tile, with the copies of later tiles under way.
#pragma once
#include "ptx.cuh"

namespace paged::cuda {

// Calls `scores(tile, keys)` and then `accumulate(tile, values)` for each tile in turn. Keys and values have `kStages`
// tiles of shared memory each; a tile is refilled as soon as the whole block has read it, so at the two waits
// 2 kStages - 1 tiles are on their way (with one stage: FlashAttention-2's order). Copies that the caller has
// started before are complete at the first call.
template <int kStages, int kTileElements, typename T, class Loader, class Scores, class Accumulate>
__device__ __forceinline__ void walk_keys(const Loader& loader, T* keys, T* values, Scores&& scores,
                                          Accumulate&& accumulate) {
  const int num_tiles = loader.num_tiles();
  const auto load_keys = [&](int tile, int block) {
    if (tile < num_tiles) loader.load_keys(tile, block, keys + tile % kStages * kTileElements);
    ptx::cp_async_commit();
  };
  const auto load_values = [&](int tile, int block) {
    if (tile < num_tiles) loader.load_values(tile, block, values + tile % kStages * kTileElements);
    ptx::cp_async_commit();
  };

  int block = loader.block_of(0);
#pragma unroll
  for (int tile = 0; tile < kStages; ++tile) {
    load_keys(tile, block);
    if (tile == kStages - 1) break;
    load_values(tile, block);
    block = loader.block_of(tile + 1);
  }
  int next_block = loader.block_of(kStages);  // read a whole tile ahead of its use

  for (int tile = 0; tile < num_tiles; ++tile) {
    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();  // this tile's keys are there, and the values before it are read
    load_values(tile + kStages - 1, block);
    block = next_block;
    next_block = loader.block_of(tile + kStages + 1);
    scores(tile, keys + tile % kStages * kTileElements);

    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();  // this tile's values are there, and its keys are read
    load_keys(tile + kStages, block);
    accumulate(tile, values + tile % kStages * kTileElements);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace paged::cuda
