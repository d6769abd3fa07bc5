// Activations of a gate.
#pragma once

#include "../linear.h"
#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

// x / (1 + e^-y)
PAGED_INLINE Vec times_sigmoid(Vec x, Vec y) {
  const auto positive = y >= 0.0f;
  const Vec e = exp2_nonpositive(select(positive, -y, y) * 1.4426950408889634f);  // e^-|y|
  return x * select(positive, splat(1.0f), e) / (1.0f + e);
}

// GELU with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), as 1 + tanh(y) is 2 sigmoid(2 y).
PAGED_INLINE Vec activate(cpu::Activation activation, Vec x) {
  if (activation == cpu::Activation::kSilu) return times_sigmoid(x, x);
  return times_sigmoid(x, x * (1.5957691216057308f + 0.07135481627f * x * x));
}

}  // namespace
}  // namespace paged::PAGED_ISA
