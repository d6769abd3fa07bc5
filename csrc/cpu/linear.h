// A linear layer over weights as nn.Linear keeps them.
#pragma once

#include <cstdint>

#include "../cache_calls.h"

namespace paged::cpu {

// What is multiplied at a time: the weights of so many outputs and inputs stay in the second-level cache while row
// after row meets them.
constexpr int64_t kOutputBlock = 64, kInputBlock = 1024, kLinearRows = 128;
// Outputs that one thread computes are a multiple of this.
constexpr int64_t kOutputStep = 16;

// Strides in elements; in_features, out and bias are contiguous. No bias pointer means none.
struct Linear {
  const char *input, *weight, *bias;
  char* out;
  Element element;
  int64_t element_size;
  int64_t num_rows, in_features, out_features, row_stride, weight_stride;

  int64_t rows_at_once() const { return num_rows < kLinearRows ? num_rows : kLinearRows; }
};

// Outputs [begin, end) for all rows. `scratch` has linear_scratch_floats.
using MultiplyRows = void(const Linear& call, int64_t begin, int64_t end, float* scratch);

static inline int64_t linear_scratch_floats(const Linear& call) {
  return call.rows_at_once() * (kOutputBlock + (call.in_features + 31) / 32 * 32);
}

void linear(const Linear& call);

}  // namespace paged::cpu
