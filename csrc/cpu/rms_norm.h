// Normalisation of rows by their root mean square.
#pragma once

#include "../cache_calls.h"

namespace paged::cpu {

// Stride in elements; rows of out, and the weight, are contiguous.
struct RmsNorm {
  const char *input, *weight;
  char* out;
  Element element;
  int64_t element_size;
  int64_t num_rows, size, row_stride;
  float eps;
};

// Rows [begin, end).
using NormaliseRows = void(const RmsNorm& call, int64_t begin, int64_t end);

void rms_norm(const RmsNorm& call);

}  // namespace paged::cpu
