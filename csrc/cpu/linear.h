// A linear layer over weights as nn.Linear keeps them, or two that share an input, one the gate of the other.
#pragma once

#include <cstdint>
#include <vector>

#include "../cache_calls.h"

namespace paged::cpu {

// Outputs, and many rows, that one thread computes are a multiple of this.
constexpr int64_t kStep = 16;
// Multiplications that are worth waking a thread for: 5 microseconds of one.
constexpr int64_t kLeastWork = 1 << 19;

// Of the gate.
enum class Activation { kNone, kSilu, kGeluTanh };

// Stride in elements. No bias pointer means none.
struct LinearWeight {
  const char *data, *bias;
  int64_t stride;
};

// out = input x weights[0], or activation(input x weights[0]) * (input x weights[1]). Stride in elements; in_features,
// out and biases are contiguous.
struct Linear {
  const char* input;
  LinearWeight weights[2];
  char* out;
  Element element;
  int64_t element_size;
  int64_t num_rows, in_features, out_features, row_stride;
  Activation activation;

  int num_weights() const { return activation == Activation::kNone ? 1 : 2; }
};

// Few rows: the weights of so many outputs and inputs stay in the second-level cache while row after row meets them.
constexpr int64_t kOutputBlock = 64, kInputBlock = 1024;

// Outputs [begin, end) for all rows.
using MultiplyFewRows = void(const Linear& call, int64_t begin, int64_t end, float* scratch);

static inline int64_t few_rows_scratch_floats(const Linear& call) {
  return call.num_rows * (2 * kOutputBlock + (call.in_features + 31) / 32 * 32);
}

// Many rows: both factors are packed. Rows x inputs stay in the second-level cache, the weights of some outputs in the
// first.
constexpr int64_t kManyRows = 512, kManyOutputs = 1024, kManyInputs = 256;
constexpr int64_t kMostOutputsAtOnce = 16;

// Outputs [output_begin, output_end) for rows [row_begin, row_end), at most kManyRows.
using MultiplyManyRows = void(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin,
                              int64_t output_end, float* scratch);

static inline int64_t many_rows_scratch_floats(const Linear&) {
  return kManyRows * kManyOutputs + (kManyRows + kMostOutputsAtOnce) * kManyInputs;
}

// With AMX the inputs of bfloat16 alone are packed, in blocks of at most so many rows x inputs, beside the sums of a
// block of outputs. The weights of kTileOutputs at a time are copied where they do not fill tiles.
constexpr int64_t kTilePackedInputs = kManyRows * 1024, kTileMostInputs = 8192, kTileOutputs = 32;

static inline int64_t amx_scratch_floats(const Linear&) {
  return kManyRows * kManyOutputs + (kTilePackedInputs + kTileOutputs * kTileMostInputs) / 2;
}

// The kernels on one instruction set; `scratch` has as many floats as they say.
struct LinearKernels {
  bool (*has_many_rows)(const Linear& call);
  MultiplyFewRows* few_rows;
  MultiplyManyRows* many_rows;
  int64_t (*few_rows_scratch_floats)(const Linear& call);
  int64_t (*many_rows_scratch_floats)(const Linear& call);
};

// Layers of one input, activation and number of rows: few rows meet them side by side, as small ones are not worth
// threads of their own.
void linear(const std::vector<Linear>& calls);

}  // namespace paged::cpu
