// Reading a cache's blocks into dense, padded rows.
#pragma once

#include "../cache_calls.h"

namespace paged::cpu {

// Blocks [begin, end) of the call below, counted row by row of the result.
using LoadBlocks = void(const CacheRead& read, const SequenceTable& table, int64_t begin, int64_t end);

void gather_cache(const CacheRead& read, const SequenceTable& table);

}  // namespace paged::cpu
