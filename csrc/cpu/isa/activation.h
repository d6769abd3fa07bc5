// Activations of a gate.
#pragma once

#include "../linear.h"
#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

// 1 / x for x from 1 to 2.
PAGED_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // A sixth of a division's time: 14 bits, and a step of Newton's.
  const Vec r = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// x / (1 + e^-y)
PAGED_INLINE Vec times_sigmoid(Vec x, Vec y) {
  const auto positive = y >= 0.0f;
  const Vec e = exp2_nonpositive(select(positive, -y, y) * 1.4426950408889634f);  // e^-|y|
  return x * select(positive, splat(1.0f), e) * reciprocal(1.0f + e);
}

// GELU with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), as 1 + tanh(y) is 2 sigmoid(2 y).
PAGED_INLINE Vec activate(cpu::Activation activation, Vec x) {
  if (activation == cpu::Activation::kSilu) return times_sigmoid(x, x);
  return times_sigmoid(x, x * (1.5957691216057308f + 0.07135481627f * x * x));
}

}  // namespace
}  // namespace paged::PAGED_ISA
