// The launcher of reshape_and_cache, over raw pointers and strides counted in elements.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace paged {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

// New rows [tokens, num_kv_heads, head_dim], last dimension contiguous.
struct NewRows {
  const void* data;
  int64_t token_stride, head_stride;
  int64_t head_dim;
};

// One layer's cache [num_blocks, block_size, num_kv_heads, head_dim].
struct CacheRows {
  void* data;
  int64_t block_stride, offset_stride, head_stride, dim_stride;
};

// What the stored rows are divided by: float32 [num_kv_heads], or [1] with stride 0; data is null for none.
struct Scale {
  const float* data;
  int64_t head_stride;
};

struct ReshapeAndCache {
  NewRows key, value;
  CacheRows key_cache, value_cache;
  Scale key_scale, value_scale;
  const int64_t* slot_mapping;
  int64_t num_tokens, num_kv_heads, block_size;
  ElementType type;
};

cudaError_t launch_reshape_and_cache(const ReshapeAndCache& call, cudaStream_t stream);

}  // namespace paged
