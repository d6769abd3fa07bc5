// Copying whole blocks within a cache or between two.
#pragma once

#include <vector>

#include "../cache_calls.h"

namespace paged::cpu {

// One pair of the mapping in one layer; `streamed`: past the caches.
using CopyBlock = void(const BlockLoops& loops, const char* src, char* dst, bool streamed);

// `block_mapping` holds `num_pairs` rows of (source, destination); no destination is written twice or read.
void copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs);

}  // namespace paged::cpu
