// Writing new keys or values into the slots of a cache.
#pragma once

#include "../cache_calls.h"

namespace paged::cpu {

// Tokens [begin, end) of the call below; `streamed`: past the caches.
using StoreTokens = void(const CacheWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end,
                         bool streamed);

// Token `t` goes to block `slot_mapping[t] / block_size`, offset `slot_mapping[t] % block_size`; -1 skips it.
void reshape_and_cache(const CacheWrite& write, const int64_t* slot_mapping);

}  // namespace paged::cpu
