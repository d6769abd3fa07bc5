// Scatters token rows into their slots, one memcpy per head, or element by element into a transposed block.
#include "../reshape_and_cache.h"

#include "row_types.h"

namespace paged::PAGED_ISA {

void store_tokens(const CacheWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end) {
  with_type(write.element, [&](auto zero) {
    using T = decltype(zero);
    const CacheView<char>& cache = write.cache;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slot_mapping[token];
      if (slot < 0) continue;
      const T* row = reinterpret_cast<const T*>(write.rows.data) + token * write.rows.token_stride;
      T* place = reinterpret_cast<T*>(cache.data) + slot / write.block_size * cache.block_stride +
                 slot % write.block_size * cache.token_stride;
      for (int64_t head = 0; head < write.num_kv_heads; ++head)
        move_row<true>(row + head * write.rows.head_stride, 1, place + head * cache.head_stride, cache.dim_stride,
                       write.head_dim, factor_of(write.scale, head));
    }
  });
}

}  // namespace paged::PAGED_ISA
