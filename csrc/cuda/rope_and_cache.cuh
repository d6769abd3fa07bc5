// Rotates queries and keys on the way to where they are kept, in float32: a thread block has a token, a warp a head.
#pragma once
#include "reshape_and_cache.cuh"

namespace paged::cuda {

// One head; each product is rounded before the sum, which gives the bits that torch gives in float32.
template <typename T, typename Angle>
__device__ __forceinline__ void rotate_row(const T* from, T* to, int64_t to_stride, int64_t head_dim,
                                           const float* factor, const Angles& angles, const Angle* cos,
                                           const Angle* sin) {
  const auto put = [&](int64_t i, float x) { to[i * to_stride] = from_float<T>(factor ? __fdiv_rn(x, *factor) : x); };
  const int64_t half = angles.rotary_dim / 2;
  for (int64_t pair = threadIdx.x; pair < half; pair += kWarpSize) {
    const int64_t i = angles.interleaved ? 2 * pair : pair, j = angles.interleaved ? i + 1 : i + half;
    const float x = to_float(from[i]), y = to_float(from[j]);
    put(i, __fsub_rn(__fmul_rn(x, to_float(cos[i])), __fmul_rn(y, to_float(sin[i]))));
    put(j, __fadd_rn(__fmul_rn(y, to_float(cos[j])), __fmul_rn(x, to_float(sin[j]))));
  }
  const int64_t rotary_dim = angles.rotary_dim;
  if (rotary_dim < head_dim)
    move_row<true>(from + rotary_dim, 1, to + rotary_dim * to_stride, to_stride, head_dim - rotary_dim, factor,
                   threadIdx.x, kWarpSize);
}

// Heads of the query, then of the key, then of the value; the last two only where the token has a slot.
template <typename T, typename Angle>
__global__ void __launch_bounds__(kStoreWarps* kWarpSize, 2)
    rope_and_cache_kernel(const __grid_constant__ RopeWrite write, const int64_t* slot_mapping) {
  const int64_t token = blockIdx.x, slot = slot_mapping[token];
  const CacheWrite& key = write.key;
  const Angle* const cos = reinterpret_cast<const Angle*>(write.angles.cos) + token * write.angles.cos_stride;
  const Angle* const sin = reinterpret_cast<const Angle*>(write.angles.sin) + token * write.angles.sin_stride;
  const int64_t heads = write.num_heads + (slot < 0 ? 0 : 2 * key.num_kv_heads);
  for (int64_t index = threadIdx.y; index < heads; index += kStoreWarps) {
    if (index < write.num_heads) {
      const T* const from = reinterpret_cast<const T*>(write.query.data) + token * write.query.token_stride +
                            index * write.query.head_stride;
      T* const to = reinterpret_cast<T*>(write.rotated) + (token * write.num_heads + index) * key.head_dim;
      rotate_row(from, to, 1, key.head_dim, nullptr, write.angles, cos, sin);
    } else if (const int64_t head = index - write.num_heads; head < key.num_kv_heads) {
      const T* const from =
          reinterpret_cast<const T*>(key.rows.data) + token * key.rows.token_stride + head * key.rows.head_stride;
      T* const to = reinterpret_cast<T*>(key.cache.data) + slot / key.block_size * key.cache.block_stride +
                    slot % key.block_size * key.cache.token_stride + head * key.cache.head_stride;
      rotate_row(from, to, key.cache.dim_stride, key.head_dim, factor_of(key.scale, head), write.angles, cos, sin);
    } else {
      store_head<T>(write.value, token, slot, head - key.num_kv_heads);
    }
  }
}

}  // namespace paged::cuda
