// A linear layer over weights as nn.Linear keeps them.
#pragma once

#include <cstdint>

#include "../cache_calls.h"

namespace paged::cpu {

// Outputs, and many rows, that one thread computes are a multiple of this.
constexpr int64_t kStep = 16;
// Multiplications that are worth waking a thread for: 5 microseconds of one.
constexpr int64_t kLeastWork = 1 << 19;

// Strides in elements; in_features, out and bias are contiguous. No bias pointer means none.
struct Linear {
  const char *input, *weight, *bias;
  char* out;
  Element element;
  int64_t element_size;
  int64_t num_rows, in_features, out_features, row_stride, weight_stride;
};

// Few rows: the weights of so many outputs and inputs stay in the second-level cache while row after row meets them.
constexpr int64_t kOutputBlock = 64, kInputBlock = 1024;

// Outputs [begin, end) for all rows. `scratch` has few_rows_scratch_floats.
using MultiplyFewRows = void(const Linear& call, int64_t begin, int64_t end, float* scratch);

static inline int64_t few_rows_scratch_floats(const Linear& call) {
  return call.num_rows * (kOutputBlock + (call.in_features + 31) / 32 * 32);
}

// Whether both factors are packed: rows x inputs stay in the second-level cache, the weights of some outputs in the
// first. 2 cores of a 4th generation Xeon, 4,864 x 896, bfloat16 multiplied as float32, GFLOP/s as few and as many
// rows: 8 rows 138 and 104, 12 rows 158 and 150, 16 rows 165 and 210, 32 rows 182 and 245, 512 rows 222 and 292; 20
// rows 175 as few, 24 rows 177 as many: vectors of 16 rows are empty in part. float32: 16 rows 132 and 170, 32 rows 172
// and 205.
static inline bool has_many_rows(int64_t num_rows) { return num_rows > 12 && (num_rows <= 16 || num_rows >= 24); }
constexpr int64_t kManyRows = 512, kManyOutputs = 1024, kManyInputs = 256;

// Outputs [output_begin, output_end) for rows [row_begin, row_end), at most kManyRows. `scratch` has
// kManyRowsScratchFloats.
using MultiplyManyRows = void(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin,
                              int64_t output_end, float* scratch);

constexpr int64_t kMostOutputsAtOnce = 16;
constexpr int64_t kManyRowsScratchFloats = kManyRows * kManyOutputs + (kManyRows + kMostOutputsAtOnce) * kManyInputs;

void linear(const Linear& call);

}  // namespace paged::cpu
