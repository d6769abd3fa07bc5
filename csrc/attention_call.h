// What one attention call reads and writes, on the CPU and on CUDA: pointers, sizes and strides, never tensors.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PAGED_HOST_DEVICE __host__ __device__
#else
#define PAGED_HOST_DEVICE
#endif

namespace paged {

// Strides of a cache, in elements.
struct CacheStrides {
  int64_t block, token, head, dim;
};

// A factor on what is stored, per KV head (`stride` 1) or one for all (`stride` 0); no data means 1.
struct StoredScale {
  const float* data;
  int64_t stride;
};

struct AttentionCall {
  const void* query;        // [num_tokens, num_heads, head_dim], last dimension contiguous
  const void* key_cache;    // [num_blocks, block_size, num_kv_heads, head_dim]
  const void* value_cache;  // [num_blocks, block_size, num_kv_heads, v_head_dim], last dimension contiguous
  void* out;                // [num_tokens, num_heads, v_head_dim], contiguous
  float* lse;               // [num_heads, num_tokens], contiguous, or null
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* cu_seqlens_q;
  const float* alibi_slopes;  // [num_heads] or null
  const float* sinks;         // [num_heads] or null
  StoredScale key_scale, value_scale;

  int64_t num_seqs, num_tokens, num_heads, num_kv_heads, head_dim, v_head_dim, block_size;
  int64_t query_token_stride, query_head_stride, table_stride;
  CacheStrides key, value;

  double scale, softcap;
  int64_t sliding_window;  // 0 = off
  bool causal;
};

struct KeyRange {
  int64_t begin, end;
};

// The functions below are static: kernels for several instruction sets include this header, and a shared inline
// function might be emitted with instructions that the machine lacks.

// Keys that a query at `position` of a sequence of `seq_len` keys sees.
PAGED_HOST_DEVICE static inline KeyRange visible_keys(const AttentionCall& call, int64_t position, int64_t seq_len) {
  KeyRange keys = {0, call.causal && position + 1 < seq_len ? position + 1 : seq_len};
  if (position < 0) return {0, 0};
  if (const int64_t window = call.sliding_window) {
    if (position - window + 1 > 0) keys.begin = position - window + 1;
    if (!call.causal && position + window < keys.end) keys.end = position + window;
  }
  return keys.begin < keys.end ? keys : KeyRange{0, 0};
}

// Keys that at least one of `count` queries from `position` on sees.
PAGED_HOST_DEVICE static inline KeyRange visible_keys(const AttentionCall& call, int64_t position, int64_t count,
                                                      int64_t seq_len) {
  if (position + count <= 0 || count <= 0) return {0, 0};
  const KeyRange first = visible_keys(call, position > 0 ? position : 0, seq_len);
  const KeyRange last = visible_keys(call, position + count - 1, seq_len);
  return {first.begin, last.end};
}

PAGED_HOST_DEVICE static inline float stored_scale(const StoredScale& scale, int64_t kv_head) {
  return scale.data ? scale.data[kv_head * scale.stride] : 1.0f;
}

}  // namespace paged
