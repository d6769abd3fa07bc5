// Combining two partial attention results by their log-sum-exp.
#pragma once

#include "cache_rows.h"

namespace paged::cpu {

// `out [tokens, num_heads, head_dim]`, head_dim contiguous, and `lse [num_heads, tokens]`; strides in elements.
struct AttentionState {
  const char* out;
  int64_t token_stride, head_stride;
  const float* lse;
  int64_t lse_head_stride, lse_token_stride;
};

// Results are contiguous. `element` is one of the number types.
void merge_attention_states(const AttentionState& a, const AttentionState& b, char* out, float* lse, Element element,
                            int64_t num_tokens, int64_t num_heads, int64_t head_dim);

}  // namespace paged::cpu
