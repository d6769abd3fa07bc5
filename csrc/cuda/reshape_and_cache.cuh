// Writes new keys and values into their slots: a thread block has a token, a warp a head.
#pragma once
#include "row_types.cuh"

namespace paged::cuda {

constexpr int kStoreWarps = 8;

// One head of a token's row into the slot, divided by the scale.
template <typename T>
__device__ __forceinline__ void store_head(const CacheWrite& write, int64_t token, int64_t slot, int64_t head) {
  const T* const from =
      reinterpret_cast<const T*>(write.rows.data) + token * write.rows.token_stride + head * write.rows.head_stride;
  T* const to = reinterpret_cast<T*>(write.cache.data) + slot / write.block_size * write.cache.block_stride +
                slot % write.block_size * write.cache.token_stride + head * write.cache.head_stride;
  move_row<true>(from, 1, to, write.cache.dim_stride, write.head_dim, factor_of(write.scale, head), threadIdx.x,
                 kWarpSize);
}

template <typename T>
__global__ void __launch_bounds__(kStoreWarps* kWarpSize, 2)
    reshape_and_cache_kernel(const __grid_constant__ CacheWrite key, const __grid_constant__ CacheWrite value,
                             const int64_t* slot_mapping) {
  const int64_t token = blockIdx.x, slot = slot_mapping[token];
  if (slot < 0) return;
  for (int64_t head = threadIdx.y; head < 2 * key.num_kv_heads; head += kStoreWarps)
    head < key.num_kv_heads ? store_head<T>(key, token, slot, head)
                            : store_head<T>(value, token, slot, head - key.num_kv_heads);
}

}  // namespace paged::cuda
