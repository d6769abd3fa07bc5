// Divides the blocks of one gather over the threads.
#include "gather_cache.h"

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void gather_cache(const CacheRead& read, const SequenceTable& table) {
  LoadBlocks* const load_blocks = cpu_kernels().load_blocks;
  const int64_t blocks_per_seq = (read.max_seq_len + read.block_size - 1) / read.block_size;
  const int64_t block_bytes = read.block_size * read.num_kv_heads * read.head_dim * read.element_size;
  torch::stable::parallel_for(0, table.num_seqs * blocks_per_seq, grain(block_bytes),
                              [&](int64_t begin, int64_t end) { load_blocks(read, table, begin, end); });
}

}  // namespace paged::cpu
