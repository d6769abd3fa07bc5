// Scatters token rows into their slots, one memcpy per head, or element by element into a transposed block.
#include "../reshape_and_cache.h"

#include "row_types.h"
#include "streamed.h"

namespace paged::PAGED_ISA {

void store_tokens(const CacheWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end, bool streamed) {
  const bool streams = streamed && !write.scale.data && write.cache.dim_stride == 1;
  with_type(write.element, [&](auto zero) {
    using T = decltype(zero);
    const CacheView<char>& cache = write.cache;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slot_mapping[token];
      if (slot < 0) continue;
      const T* row = reinterpret_cast<const T*>(write.rows.data) + token * write.rows.token_stride;
      T* place = reinterpret_cast<T*>(cache.data) + slot / write.block_size * cache.block_stride +
                 slot % write.block_size * cache.token_stride;
      for (int64_t head = 0; head < write.num_kv_heads; ++head) {
        const T* const from = row + head * write.rows.head_stride;
        T* const to = place + head * cache.head_stride;
        if (streams)
          copy_streamed(to, from, write.head_dim * sizeof(T));
        else
          move_row<true>(from, 1, to, cache.dim_stride, write.head_dim, factor_of(write.scale, head));
      }
    }
  });
  if (streams) end_streamed();
}

}  // namespace paged::PAGED_ISA
