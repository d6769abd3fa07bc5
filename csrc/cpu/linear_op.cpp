// The torch face of linear: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "linear.h"
#include "linear_checks.h"

namespace paged {
namespace {

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Arg rows{input, "input"}, weights{weight, "weight"};
  check_linear_input(rows);
  check_dim(weights, 2, "[out_features, in_features]");
  check_same_dtype(weights, rows);
  check_same_device(weights, rows);
  check_size(weights, 1, input.size(1), "in_features of input");
  check_last_dim_contiguous(weights);
  const int64_t out_features = weight.size(0);
  check_linear_bias(bias, rows, out_features);
  Tensor out = torch::stable::new_empty(input, {input.size(0), out_features});
  if (out.numel() > 0)
    cpu::linear({static_cast<const char*>(input.const_data_ptr()), static_cast<const char*>(weight.const_data_ptr()),
                 bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr,
                 static_cast<char*>(out.mutable_data_ptr()), number_of(input), int64_t(input.element_size()),
                 input.size(0), input.size(1), out_features, input.stride(0), weight.stride(0)});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace paged
