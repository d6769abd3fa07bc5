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

// A block as up to three nested loops around one memcpy.
struct BlockLoops {
  int64_t sizes[3] = {1, 1, 1};
  int64_t src_strides[3] = {};
  int64_t dst_strides[3] = {};
  int64_t run_bytes = 0;
};

// One pair of the mapping in one layer.
using CopyBlock = void(const BlockLoops& loops, const char* src, char* dst);

// `block_mapping` holds `num_pairs` rows of (source, destination); no destination is written twice or read.
void copy_blocks(const std::vector<LayerCopy>& layers, const int64_t* block_mapping, int64_t num_pairs);

}  // namespace paged::cpu
