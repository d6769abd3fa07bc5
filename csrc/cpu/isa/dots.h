// Dot products of rows as they are stored with rows that were packed before: of keys with queries, of weights with
// inputs.
#pragma once

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;  // of 32 registers
#else
constexpr int kAccumulators = 8;  // of 16 registers
#endif

// `share` stored rows lie side by side in a vector, and the packed row is packed as so many equal ones.
template <class Stored>
struct FloatDot {
  using Packed = float;
  using Part = Chunk;
  using PackedPart = Chunk;
  template <int share>
  PAGED_INLINE Part load_parts(const Stored* a, const Stored* b) {
    if constexpr (share == 2) return load_halves(a, b);
    return load_chunk(a);
  }
  PAGED_INLINE void pack(float* to, Part part) { store_chunk(to, part); }
  PAGED_INLINE Chunk load_packed(const float* packed) { return load_chunk(packed); }
  PAGED_INLINE Vec multiply_add(Vec sum, Part stored, Chunk packed) {
    return sum + stored.first * packed.first + stored.second * packed.second;
  }
};

// Sums of weighted rows, a row at a time.
template <class Stored>
struct FloatSum {
  static constexpr int kRows = 1;
  using Weight = float;
  PAGED_INLINE Chunk load_rows(const Stored* row, const Stored*) { return load_chunk(row); }
  PAGED_INLINE Vec multiply_add(Vec sum, Vec values, float weight) { return sum + values * weight; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  using Packed = BFloat16;
  using Part = BitVec;
  using PackedPart = __m512bh;
  template <int share>
  PAGED_INLINE Part load_parts(const BFloat16* a, const BFloat16* b) {
    if constexpr (share == 2) return join<BitVec>(a, b);
    return load_as<BitVec>(a);
  }
  PAGED_INLINE void pack(BFloat16* to, Part part) { store_as(to, part); }
  PAGED_INLINE __m512bh load_packed(const BFloat16* packed) { return load_as<__m512bh>(packed); }
  PAGED_INLINE Vec multiply_add(Vec sum, Part stored, __m512bh packed) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)stored, packed);
  }
};

// Two rows at a time: a lane has an element of each, and a weight is those of both, rounded.
struct BFloat16Sum {
  static constexpr int kRows = 2;
  using Weight = uint32_t;
  PAGED_INLINE Chunk load_rows(const BFloat16* first, const BFloat16* second) {
    return pair_rows(load_as<BitVec>(first), load_as<BitVec>(second));
  }
  PAGED_INLINE Vec multiply_add(Vec sum, Vec values, uint32_t weights) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)values, (__m512bh)_mm512_set1_epi32(int(weights)));
  }
};
#else
using BFloat16Dot = FloatDot<BFloat16>;
using BFloat16Sum = FloatSum<BFloat16>;
#endif

}  // namespace
}  // namespace paged::PAGED_ISA
