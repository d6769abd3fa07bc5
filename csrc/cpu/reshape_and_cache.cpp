// Scatters token rows into their slots, one memcpy per head, or element by element into a transposed block.
#include "reshape_and_cache.h"

#include <torch/csrc/stable/ops.h>

#include "grain.h"

namespace paged::cpu {
namespace {

template <class T>
void store_head(const T* row, T* slot, int64_t dim_stride, int64_t head_dim, const float* scale) {
  if constexpr (is_number<T>) {
    if (scale) {
      const Compute<T> divisor = *scale;
      for (int64_t d = 0; d < head_dim; ++d) slot[d * dim_stride] = T(Compute<T>(row[d]) / divisor);
      return;
    }
  }
  if (dim_stride == 1) {
    std::memcpy(slot, row, head_dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < head_dim; ++d) slot[d * dim_stride] = row[d];
  }
}

template <class T>
void store_token(const CacheWrite& write, int64_t token, int64_t slot) {
  const CacheView<char>& cache = write.cache;
  const T* row = reinterpret_cast<const T*>(write.rows.data) + token * write.rows.token_stride;
  T* place = reinterpret_cast<T*>(cache.data) + slot / write.block_size * cache.block_stride +
             slot % write.block_size * cache.token_stride;
  for (int64_t head = 0; head < write.num_kv_heads; ++head) {
    const float* scale = write.scale.data ? write.scale.data + head * write.scale.stride : nullptr;
    store_head(row + head * write.rows.head_stride, place + head * cache.head_stride, cache.dim_stride, write.head_dim,
               scale);
  }
}

}  // namespace

void reshape_and_cache(const CacheWrite& write, const int64_t* slot_mapping) {
  with_type(write.element, [&](auto zero) {
    using T = decltype(zero);
    const int64_t token_bytes = write.num_kv_heads * write.head_dim * int64_t(sizeof(T));
    torch::stable::parallel_for(0, write.num_tokens, grain(token_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        if (slot_mapping[token] >= 0) store_token<T>(write, token, slot_mapping[token]);
    });
  });
}

}  // namespace paged::cpu
