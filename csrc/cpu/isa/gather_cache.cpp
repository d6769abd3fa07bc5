// Gathers a block at a time, so that each block is read from front to back, and zeroes what lies past a sequence's end.
#include "../gather_cache.h"

#include "row_types.h"

namespace paged::PAGED_ISA {
namespace {

template <class T>
void load_block(const CacheRead& read, int64_t block, int64_t num_tokens, T* rows) {
  const CacheView<const char>& cache = read.cache;
  const T* slots = reinterpret_cast<const T*>(cache.data) + block * cache.block_stride;
  for (int64_t head = 0; head < read.num_kv_heads; ++head)
    for (int64_t token = 0; token < num_tokens; ++token)
      move_row<false>(slots + token * cache.token_stride + head * cache.head_stride, cache.dim_stride,
                      rows + (token * read.num_kv_heads + head) * read.head_dim, 1, read.head_dim,
                      factor_of(read.scale, head));
}

}  // namespace

void load_blocks(const CacheRead& read, const SequenceTable& table, int64_t begin, int64_t end) {
  const int64_t columns = (read.max_seq_len + read.block_size - 1) / read.block_size;
  const int64_t row_size = read.num_kv_heads * read.head_dim;
  with_type(read.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / columns, column = i % columns, first = column * read.block_size;
      const int64_t left = read.max_seq_len - first, stored = table.seq_lens[s] - first;
      const int64_t num_rows = left < read.block_size ? left : read.block_size;
      const int64_t num_tokens = stored < 0 ? 0 : stored < num_rows ? stored : num_rows;
      T* rows = reinterpret_cast<T*>(read.rows) + (s * read.max_seq_len + first) * row_size;
      if (num_tokens > 0) load_block(read, table.block_table[s * table.row_stride + column], num_tokens, rows);
      std::memset(static_cast<void*>(rows + num_tokens * row_size), 0, (num_rows - num_tokens) * row_size * sizeof(T));
    }
  });
}

}  // namespace paged::PAGED_ISA
