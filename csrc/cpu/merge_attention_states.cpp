// Divides the rows of one merge over the threads.
#include "merge_attention_states.h"

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void merge_attention_states(const StateMerge& merge) {
  MergeStates* const merge_states = cpu_kernels().merge_states;
  const int64_t row_bytes = 3 * merge.head_dim * merge.element_size;
  torch::stable::parallel_for(0, merge.num_tokens * merge.num_heads, grain(row_bytes),
                              [&](int64_t begin, int64_t end) { merge_states(merge, begin, end); });
}

}  // namespace paged::cpu
