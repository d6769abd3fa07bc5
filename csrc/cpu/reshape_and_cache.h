// Writing new keys or values into the slots of a cache.
#pragma once

#include "cache_rows.h"

namespace paged::cpu {

// Dense rows `[tokens, num_kv_heads, head_dim]`, strides in elements, head_dim contiguous.
struct NewRows {
  const char* data;
  int64_t token_stride, head_stride;
};

struct CacheWrite {
  NewRows rows;
  CacheView<char> cache;
  Scale scale;  // what is stored is the row divided by it
  Element element;
  int64_t element_size;
  int64_t num_tokens, num_kv_heads, head_dim, block_size;
};

// Tokens [begin, end) of the call below.
using StoreTokens = void(const CacheWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end);

// Token `t` goes to block `slot_mapping[t] / block_size`, offset `slot_mapping[t] % block_size`; -1 skips it.
void reshape_and_cache(const CacheWrite& write, const int64_t* slot_mapping);

}  // namespace paged::cpu
