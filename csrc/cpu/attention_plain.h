// Attention one row at a time, without vectors or tiles.
#pragma once

#include "attention.h"

namespace paged {

// Rows [begin, end) of the flattened [num_tokens, num_heads].
void attention_plain_float64(const AttentionCall& call, int64_t begin, int64_t end);
void attention_plain_float32(const AttentionCall& call, int64_t begin, int64_t end);
void attention_plain_bfloat16(const AttentionCall& call, int64_t begin, int64_t end);
void attention_plain_float16(const AttentionCall& call, int64_t begin, int64_t end);

}  // namespace paged
