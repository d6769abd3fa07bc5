// A cache and its dense rows as the copying kernels see them: pointers, strides, element types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

struct Bytes16 {
  char bytes[16];
};

template <class T>
constexpr bool is_number = std::is_same_v<T, float> || std::is_same_v<T, double> ||
                           std::is_same_v<T, torch::headeronly::BFloat16> || std::is_same_v<T, torch::headeronly::Half>;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls `f` with a value of the C++ type that stands for `element`.
template <class F>
void with_type(Element element, const F& f) {
  switch (element) {
    case Element::kBytes1: return f(uint8_t());
    case Element::kBytes2: return f(uint16_t());
    case Element::kBytes4: return f(uint32_t());
    case Element::kBytes8: return f(uint64_t());
    case Element::kBytes16: return f(Bytes16());
    case Element::kFloat32: return f(float());
    case Element::kFloat64: return f(double());
    case Element::kBFloat16: return f(torch::headeronly::BFloat16());
    case Element::kFloat16: return f(torch::headeronly::Half());
  }
}

}  // namespace paged::cpu
