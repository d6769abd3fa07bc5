// The element types of rows that are moved, and moving them: 16 bytes at a time where both sides allow it.
#pragma once
#include <cuda_runtime_api.h>

#include <type_traits>

#include "../cache_calls.h"
#include "elements.cuh"

namespace paged::cuda {

// Calls `f` with a value of the type that stands for bytes of `element`.
template <class F>
cudaError_t with_bytes(Element element, const F& f) {
  switch (element) {
    case Element::kBytes1: return f(uint8_t());
    case Element::kBytes2: return f(uint16_t());
    case Element::kBytes4: return f(uint32_t());
    case Element::kBytes8: return f(uint64_t());
    case Element::kBytes16: return f(uint4());
    default: return cudaErrorInvalidValue;
  }
}

// The same for bytes and for numbers.
template <class F>
cudaError_t with_type(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32: return f(float());
    case Element::kFloat64: return f(double());
    case Element::kBFloat16: return f(__nv_bfloat16());
    case Element::kFloat16: return f(__half());
    default: return with_bytes(element, f);
  }
}

// The same for the types that are computed with.
template <class F>
cudaError_t with_number(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32: return f(float());
    case Element::kBFloat16: return f(__nv_bfloat16());
    case Element::kFloat16: return f(__half());
    default: return cudaErrorInvalidValue;
  }
}

template <typename T>
constexpr bool is_number = false;
template <>
constexpr bool is_number<float> = true;
template <>
constexpr bool is_number<double> = true;
template <>
constexpr bool is_number<__nv_bfloat16> = true;
template <>
constexpr bool is_number<__half> = true;

__device__ __forceinline__ double to_float(double x) { return x; }

// Multiplied, or divided, by a factor in float32, or float64 for float64.
template <bool kDivide, typename T>
__device__ __forceinline__ T scaled(T x, float factor) {
  if constexpr (std::is_same_v<T, double>) {
    return kDivide ? x / factor : x * factor;
  } else if constexpr (is_number<T>) {
    return from_float<T>(kDivide ? __fdiv_rn(to_float(x), factor) : to_float(x) * factor);
  } else {
    return x;  // bytes have no factor
  }
}

__device__ __forceinline__ bool in_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

__device__ __forceinline__ const float* factor_of(const Scale& scale, int64_t head) {
  return scale.data ? scale.data + head * scale.stride : nullptr;
}

// One row by `count` lanes, of which this one is `lane`; strides in elements.
template <bool kDivide, typename T>
__device__ __forceinline__ void move_row(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t size,
                                         const float* factor, int lane, int count) {
  const bool is_dense = from_stride == 1 && to_stride == 1 && factor == nullptr;
  if (is_dense && size * sizeof(T) % sizeof(uint4) == 0 && in_16_bytes(from) && in_16_bytes(to)) {
    const int64_t pieces = size * sizeof(T) / sizeof(uint4);
    for (int64_t i = lane; i < pieces; i += count)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    return;
  }
  for (int64_t i = lane; i < size; i += count) {
    const T x = from[i * from_stride];
    to[i * to_stride] = factor ? scaled<kDivide>(x, *factor) : x;
  }
}

}  // namespace paged::cuda
