// Combining two partial attention results by their log-sum-exp.
#pragma once

#include "../cache_calls.h"

namespace paged::cpu {

// Rows [begin, end) of the call below, counted token by token.
using MergeStates = void(const StateMerge& merge, int64_t begin, int64_t end);

void merge_attention_states(const StateMerge& merge);

}  // namespace paged::cpu
