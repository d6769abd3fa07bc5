// Element types of tensors on the device: conversion from and to float32, and packing for 16-byte stores.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace paged::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two 16-bit elements in one register, `x` in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 both = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}

// Stores neighbours, at a boundary of their size.
__device__ __forceinline__ void store_row(float* target, const float (&values)[4]) {
  *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
}
template <typename T>
__device__ __forceinline__ void store_row(T* target, const float (&values)[4]) {
  *reinterpret_cast<uint2*>(target) = make_uint2(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]));
}
template <typename T>
__device__ __forceinline__ void store_row(T* target, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(target) = make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                                 pack<T>(values[4], values[5]), pack<T>(values[6], values[7]));
}

}  // namespace paged::cuda
