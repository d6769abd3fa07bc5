// A cache and its dense rows as the copying kernels see them: pointers, strides, element types.
#pragma once

#include <cstdint>

namespace paged::cpu {

// Strides count elements. `Byte` is `char` where the cache is written, `const char` where it is read.
template <class Byte>
struct CacheView {
  Byte* data;
  int64_t block_stride, token_stride, head_stride, dim_stride;
};

// What the elements are. Bytes of some size are moved as they are; numbers can be scaled on the way.
enum class Element { kBytes1, kBytes2, kBytes4, kBytes8, kBytes16, kFloat32, kFloat64, kBFloat16, kFloat16 };

// A factor per KV head, or one for all with stride 0; no pointer means 1.
struct Scale {
  const float* data = nullptr;
  int64_t stride = 0;
};

}  // namespace paged::cpu
