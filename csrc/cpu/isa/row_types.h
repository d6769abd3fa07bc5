// The element types of rows that are moved, and their scaling on the way.
#pragma once

#include <type_traits>

#include "../../cache_calls.h"
#include "cached_rows.h"

namespace paged::PAGED_ISA {
namespace {

struct Bytes16 {
  char bytes[16];
};

template <class T>
constexpr bool is_number =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

// Calls `f` with a value of the C++ type that stands for `element`.
template <class F>
PAGED_INLINE void with_type(Element element, const F& f) {
  switch (element) {
    case Element::kBytes1: return f(uint8_t());
    case Element::kBytes2: return f(uint16_t());
    case Element::kBytes4: return f(uint32_t());
    case Element::kBytes8: return f(uint64_t());
    case Element::kBytes16: return f(Bytes16());
    case Element::kFloat32: return f(float());
    case Element::kFloat64: return f(double());
    case Element::kBFloat16: return f(BFloat16());
    case Element::kFloat16: return f(Float16());
  }
}

// The factor of a head, or null for 1.
PAGED_INLINE const float* factor_of(const Scale& scale, int64_t head) {
  return scale.data ? scale.data + head * scale.stride : nullptr;
}

template <class T>
PAGED_INLINE void scatter_chunk(T* to, Chunk c, int64_t count, int64_t stride) {
  if (stride == 1) return store_chunk(to, c, count);
  T packed[kChunk];
  store_chunk(packed, c);
  for (int64_t i = 0; i < count && i < kChunk; ++i) to[i * stride] = packed[i];
}

// Moves one head of a token, divided or multiplied by its factor on the way if it has one.
template <bool divide, class T>
PAGED_INLINE void move_row(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t size,
                           const float* factor) {
  if constexpr (std::is_same_v<T, double>) {
    if (factor) {
      for (int64_t d = 0; d < size; ++d)
        to[d * to_stride] = divide ? from[d * from_stride] / *factor : from[d * from_stride] * *factor;
      return;
    }
  } else if constexpr (is_number<T>) {
    if (factor) {
      for (int64_t d = 0; d < size; d += kChunk) {
        const Chunk c = gather_chunk(from, d, size, from_stride);
        const Chunk moved =
            divide ? Chunk{c.first / *factor, c.second / *factor} : Chunk{c.first * *factor, c.second * *factor};
        scatter_chunk(to + d * to_stride, moved, size - d, to_stride);
      }
      return;
    }
  }
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(static_cast<void*>(to), from, size * sizeof(T));
  } else {
    for (int64_t d = 0; d < size; ++d) to[d * to_stride] = from[d * from_stride];
  }
}

}  // namespace
}  // namespace paged::PAGED_ISA
