// A linear layer over weights packed for the few rows of a decode step.
#pragma once

#include <cstdint>

#include "../cache_calls.h"

namespace paged::cpu {

// Outputs that lie together in packed weights, `[num_panels, ceil(in_features / 2), 2 * kPanel]`: of bfloat16 as
// `[kPanel, 2]`, one pair of inputs beside the other; of other types as `[2, kPanel]`.
constexpr int64_t kPanel = 32;
// Rows that are converted at a time, and then multiplied by one panel after the other.
constexpr int64_t kRowBlock = 32;

// Strides in elements; in_features and out_features are contiguous. No bias pointer means none.
struct PackedLinear {
  const char *input, *packed_weight, *bias;
  char* out;
  Element element;
  int64_t element_size;
  int64_t num_rows, in_features, out_features, row_stride;

  int64_t num_pairs() const { return (in_features + 1) / 2; }
  int64_t num_panels() const { return (out_features + kPanel - 1) / kPanel; }
};

// For a block of rows: two floats for each pair of inputs; or for two blocks bfloat16 rows as long as tiles take them.
static inline int64_t panels_scratch_floats(const PackedLinear& call) {
  return kRowBlock * (2 * call.num_pairs() + 32);
}

// Panels [begin, end) for all rows; `scratch` has panels_scratch_floats.
using MultiplyPanels = void(const PackedLinear& call, int64_t begin, int64_t end, float* scratch);

void packed_linear(const PackedLinear& call);

}  // namespace paged::cpu
