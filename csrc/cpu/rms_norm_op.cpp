// The torch face of rms_norm: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "rms_norm.h"
#include "rows.h"

namespace paged {
namespace {

Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  const Arg input_arg{input, "input"}, scale{weight, "weight"};
  const Rows rows = rows_of(input_arg, "size");
  check_dim(scale, 1, "[size]");
  check_same_dtype(scale, input_arg);
  check_same_device(scale, input_arg);
  check_size(scale, 0, rows.size, "size of input");
  check_contiguous(scale);
  Tensor out = torch::stable::new_empty(input, rows.shape);
  if (out.numel() > 0)
    cpu::rms_norm({static_cast<const char*>(input.const_data_ptr()), static_cast<const char*>(weight.const_data_ptr()),
                   static_cast<char*>(out.mutable_data_ptr()), number_of(input), int64_t(input.element_size()),
                   rows.count, rows.size, rows.stride, float(eps)});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace paged
