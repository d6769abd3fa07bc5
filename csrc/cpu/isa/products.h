// Products of packed factors: scalars of the left one times vectors of the right one, summed in registers.
#pragma once

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 8;  // scalars of the left factor times kChunk of the right one: 16 sums, of 32 registers
#else
constexpr int kBlock = 4;  // 8 sums, of 16 registers
#endif

// How the factors of a product are packed and multiplied: in floats.
struct FloatFactors {
  using Factor = float;
  static constexpr int kTerms = 1;  // elements in one factor
  PAGED_INLINE Vec load_factors(const float* from) { return load(from); }
  PAGED_INLINE Vec multiply_add(Vec sum, float left, Vec right) { return sum + right * left; }
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16, each the two terms of a dot product.
struct BFloat16Factors {
  using Factor = uint32_t;
  static constexpr int kTerms = 2;
  PAGED_INLINE Vec load_factors(const uint32_t* from) { return load_as<Vec>(from); }
  PAGED_INLINE Vec multiply_add(Vec sum, uint32_t left, Vec right) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
  }
};
#else
using BFloat16Factors = FloatFactors;
#endif

// product [scalars][vectors] of `terms` factors: left[i * left_row + k * left_step] times right[k][vectors * kLanes].
// Calls `between` for each k.
template <class Factors, int scalars, int vectors, class Between>
PAGED_INLINE void multiply(const typename Factors::Factor* left, int64_t left_row, int64_t left_step,
                           const typename Factors::Factor* right, int64_t terms, Vec* product, Between&& between) {
  Vec sum[scalars * vectors] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Vec factors[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) factors[v] = Factors::load_factors(right + (k * vectors + v) * kLanes);
    between(k);
#pragma GCC unroll 16
    for (int i = 0; i < scalars; ++i) {
      const typename Factors::Factor factor = left[i * left_row + k * left_step];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        sum[i * vectors + v] = Factors::multiply_add(sum[i * vectors + v], factor, factors[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < scalars * vectors; ++i) product[i] = sum[i];
}

}  // namespace
}  // namespace paged::PAGED_ISA
