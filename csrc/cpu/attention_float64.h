// Attention in float64, one row at a time: for exact comparisons, not for speed.
#pragma once

#include "../attention_call.h"

namespace paged {

// Rows [begin, end) of the flattened [num_tokens, num_heads]. A row's keys are never split.
void attention_float64(const AttentionCall& call, int64_t begin, int64_t end);

}  // namespace paged
