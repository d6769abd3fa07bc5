// The torch face of packed_linear: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "linear_checks.h"
#include "packed_linear.h"

namespace paged {
namespace {

Tensor packed_linear(const Tensor& input, const Tensor& packed_weight, const std::optional<Tensor>& bias,
                     int64_t out_features) {
  const Arg rows{input, "input"}, weight{packed_weight, "packed_weight"};
  check_linear_input(rows);
  check_at_least_0("out_features", out_features);
  check_dim(weight, 3, "[ceil(out_features / 32), ceil(in_features / 2), 64]");
  check_same_dtype(weight, rows);
  check_same_device(weight, rows);
  check_contiguous(weight);
  check_size(weight, 0, (out_features + cpu::kPanel - 1) / cpu::kPanel, "panels of 32 out_features");
  check_size(weight, 1, (input.size(1) + 1) / 2, "pairs of in_features of input");
  check_size(weight, 2, 2 * cpu::kPanel, "a panel's pairs");
  check_linear_bias(bias, "bias", rows, out_features);
  Tensor out = torch::stable::new_empty(input, {input.size(0), out_features});
  if (out.numel() > 0)
    cpu::packed_linear(
        {static_cast<const char*>(input.const_data_ptr()), static_cast<const char*>(packed_weight.const_data_ptr()),
         bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr, static_cast<char*>(out.mutable_data_ptr()),
         number_of(input), int64_t(input.element_size()), input.size(0), input.size(1), out_features, input.stride(0)});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace paged
