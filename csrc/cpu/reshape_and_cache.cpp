// Divides the tokens of one write over the threads.
#include "reshape_and_cache.h"

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void reshape_and_cache(const CacheWrite& write, const int64_t* slot_mapping) {
  StoreTokens* const store_tokens = cpu_kernels().store_tokens;
  const int64_t token_bytes = write.num_kv_heads * write.head_dim * write.element_size;
  const bool streamed = write.num_tokens * token_bytes >= kStreamedBytes;
  torch::stable::parallel_for(0, write.num_tokens, grain(token_bytes), [&](int64_t begin, int64_t end) {
    store_tokens(write, slot_mapping, begin, end, streamed);
  });
}

}  // namespace paged::cpu
