// Copying whole blocks within a cache or between two.
#pragma once

#include <cstdint>
#include <vector>

namespace paged::cpu {

// One layer; dimensions are num_blocks, block_size, num_kv_heads, head_dim. Strides in bytes.
struct LayerCopy {
  const char* src;
  char* dst;
  int64_t sizes[4];
  int64_t src_strides[4];
  int64_t dst_strides[4];
  int64_t element_size;
};

// `block_mapping` holds `num_pairs` rows of (source, destination); no destination is written twice or read.
void copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs);

}  // namespace paged::cpu
