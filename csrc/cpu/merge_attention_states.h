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
struct StateMerge {
  AttentionState a, b;
  char* out;
  float* lse;
  Element element;
  int64_t element_size;
  int64_t num_tokens, num_heads, head_dim;
};

// Rows [begin, end) of the call below, counted token by token.
using MergeStates = void(const StateMerge& merge, int64_t begin, int64_t end);

void merge_attention_states(const StateMerge& merge);

}  // namespace paged::cpu
