// The rows of an input of any number of dimensions.
#pragma once

#include <vector>

#include "../op_views.h"

namespace paged {

// Stride in elements.
struct Rows {
  int64_t count, size, stride;
  std::vector<int64_t> shape;  // of the input
};

// Numbers `[..., size]`. Rows of a matrix may have anything between them, those of more dimensions may not.
inline Rows rows_of(const Arg& arg, const char* size) {
  const int64_t dim = arg.tensor.dim();
  if (dim == 0) reject(arg, "shape []", text("[..., ", size, "]"));
  check_dtype(arg, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  dim == 2 ? check_last_dim_contiguous(arg) : check_contiguous(arg);
  Rows rows{1, arg.size(dim - 1), 0, {}};
  for (int64_t d = 0; d < dim; ++d) rows.shape.push_back(arg.size(d));
  for (int64_t d = 0; d < dim - 1; ++d) rows.count *= arg.size(d);
  rows.stride = dim == 2 ? arg.stride(0) : rows.size;
  return rows;
}

}  // namespace paged
