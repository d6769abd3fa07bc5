// The kernel of reshape_and_cache: a warp writes one token's key and value row of one head into its slot.
#pragma once
#include <cstdint>

#include "reshape_and_cache.h"

namespace paged {

constexpr int kWarpSize = 32;
constexpr int kRowsPerBlock = 8;

__device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(int4) == 0;
}

template <typename T>
__device__ void store_row(const T* source, T* target, int64_t dim_stride, int64_t head_dim, const float* scale) {
  const int lane = threadIdx.x;
  const int64_t bytes = head_dim * sizeof(T);
  if (scale == nullptr && dim_stride == 1 && bytes % sizeof(int4) == 0 && is_aligned(source) && is_aligned(target)) {
    const int64_t pieces = bytes / sizeof(int4);
    for (int64_t i = lane; i < pieces; i += kWarpSize) {
      reinterpret_cast<int4*>(target)[i] = reinterpret_cast<const int4*>(source)[i];
    }
    return;
  }
  for (int64_t i = lane; i < head_dim; i += kWarpSize) {
    target[i * dim_stride] = scale == nullptr ? source[i] : T(float(source[i]) / *scale);
  }
}

template <typename T>
__device__ void store_head(const NewRows& rows, const CacheRows& cache, const Scale& scale, int64_t token,
                           int64_t block, int64_t offset, int64_t head) {
  const T* source = static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
  T* target = static_cast<T*>(cache.data) + block * cache.block_stride + offset * cache.offset_stride +
              head * cache.head_stride;
  const float* divisor = scale.data == nullptr ? nullptr : scale.data + head * scale.head_stride;
  store_row(source, target, cache.dim_stride, rows.head_dim, divisor);
}

template <typename T>
__global__ void reshape_and_cache_kernel(ReshapeAndCache call) {
  const int64_t token = blockIdx.x;
  const int64_t slot = call.slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / call.block_size;
  const int64_t offset = slot % call.block_size;
  for (int64_t head = threadIdx.y; head < call.num_kv_heads; head += kRowsPerBlock) {
    store_head<T>(call.key, call.key_cache, call.key_scale, token, block, offset, head);
    store_head<T>(call.value, call.value_cache, call.value_scale, token, block, offset, head);
  }
}

}  // namespace paged
