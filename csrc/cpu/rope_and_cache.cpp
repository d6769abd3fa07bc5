// Divides the tokens of one rotation and write over the threads.
#include "rope_and_cache.h"

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void rope_and_cache(const RopeWrite& write, const int64_t* slot_mapping) {
  RotateTokens* const rotate_tokens = cpu_kernels().rotate_tokens;
  const CacheWrite &key = write.key, &value = write.value;
  const int64_t token_elements =
      (write.num_heads + key.num_kv_heads) * key.head_dim + value.num_kv_heads * value.head_dim;
  torch::stable::parallel_for(0, key.num_tokens, grain(token_elements * key.element_size),
                              [&](int64_t begin, int64_t end) { rotate_tokens(write, slot_mapping, begin, end); });
}

}  // namespace paged::cpu
