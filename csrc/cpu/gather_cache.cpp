// Gathers a block at a time, so that each block is read from front to back, and zeroes what lies past a sequence's end.
#include "gather_cache.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "grain.h"

namespace paged::cpu {
namespace {

template <class T>
void load_head(const T* slot, int64_t dim_stride, T* row, int64_t head_dim, const float* scale) {
  if constexpr (is_number<T>) {
    if (scale) {
      const Compute<T> factor = *scale;
      for (int64_t d = 0; d < head_dim; ++d) row[d] = T(Compute<T>(slot[d * dim_stride]) * factor);
      return;
    }
  }
  if (dim_stride == 1) {
    std::memcpy(row, slot, head_dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < head_dim; ++d) row[d] = slot[d * dim_stride];
  }
}

template <class T>
void load_block(const CacheRead& read, int64_t block, int64_t num_tokens, T* rows) {
  const CacheView<const char>& cache = read.cache;
  const T* slots = reinterpret_cast<const T*>(cache.data) + block * cache.block_stride;
  for (int64_t head = 0; head < read.num_kv_heads; ++head) {
    const float* scale = read.scale.data ? read.scale.data + head * read.scale.stride : nullptr;
    for (int64_t token = 0; token < num_tokens; ++token)
      load_head(slots + token * cache.token_stride + head * cache.head_stride, cache.dim_stride,
                rows + (token * read.num_kv_heads + head) * read.head_dim, read.head_dim, scale);
  }
}

}  // namespace

void gather_cache(const CacheRead& read, const SequenceTable& table) {
  const int64_t blocks_per_seq = (read.max_seq_len + read.block_size - 1) / read.block_size;
  with_type(read.element, [&](auto zero) {
    using T = decltype(zero);
    const int64_t row_size = read.num_kv_heads * read.head_dim;
    const int64_t block_bytes = read.block_size * row_size * int64_t(sizeof(T));
    torch::stable::parallel_for(
        0, table.num_seqs * blocks_per_seq, grain(block_bytes), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t s = i / blocks_per_seq, column = i % blocks_per_seq, first = column * read.block_size;
            const int64_t num_rows = std::min(read.block_size, read.max_seq_len - first);
            const int64_t num_tokens = std::clamp<int64_t>(table.seq_lens[s] - first, 0, num_rows);
            T* rows = reinterpret_cast<T*>(read.rows) + (s * read.max_seq_len + first) * row_size;
            if (num_tokens > 0) load_block(read, table.block_table[s * table.row_stride + column], num_tokens, rows);
            std::memset(static_cast<void*>(rows + num_tokens * row_size), 0,
                        (num_rows - num_tokens) * row_size * sizeof(T));
          }
        });
  });
}

}  // namespace paged::cpu
