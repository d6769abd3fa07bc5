// The torch faces of linear and gated_linear: unpack tensors, check them, call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "linear.h"
#include "linear_checks.h"
#include "rows.h"

namespace paged {
namespace {

cpu::LinearWeight linear_weight(const Arg& weight, const Arg& input, const Rows& rows,
                                const std::optional<Tensor>& bias, const char* name_of_bias) {
  check_dim(weight, 2, "[out_features, in_features]");
  check_same_dtype(weight, input);
  check_same_device(weight, input);
  check_size(weight, 1, rows.size, "in_features of input");
  check_last_dim_contiguous(weight);
  check_linear_bias(bias, name_of_bias, input, weight.size(0));
  return {static_cast<const char*>(weight.tensor.const_data_ptr()),
          bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr, weight.tensor.stride(0)};
}

Tensor run(const Tensor& input, Rows rows, cpu::LinearWeight first, cpu::LinearWeight second, int64_t out_features,
           cpu::Activation activation) {
  rows.shape.back() = out_features;
  Tensor out = torch::stable::new_empty(input, rows.shape);
  if (out.numel() > 0)
    cpu::linear({static_cast<const char*>(input.const_data_ptr()),
                 {first, second},
                 static_cast<char*>(out.mutable_data_ptr()),
                 number_of(input),
                 int64_t(input.element_size()),
                 rows.count,
                 rows.size,
                 out_features,
                 rows.stride,
                 activation});
  return out;
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Arg input_arg{input, "input"};
  const Rows rows = rows_of(input_arg, "in_features");
  const cpu::LinearWeight layer = linear_weight({weight, "weight"}, input_arg, rows, bias, "bias");
  return run(input, rows, layer, {}, weight.size(0), cpu::Activation::kNone);
}

Tensor gated_linear(const Tensor& input, const Tensor& gate_weight, const Tensor& up_weight,
                    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                    const std::string& activation) {
  const Arg input_arg{input, "input"}, up_arg{up_weight, "up_weight"};
  const Rows rows = rows_of(input_arg, "in_features");
  const cpu::LinearWeight gate = linear_weight({gate_weight, "gate_weight"}, input_arg, rows, gate_bias, "gate_bias");
  const cpu::LinearWeight up = linear_weight(up_arg, input_arg, rows, up_bias, "up_bias");
  check_size(up_arg, 0, gate_weight.size(0), "out_features of gate_weight");
  if (activation != "silu" && activation != "gelu_tanh") reject("activation", activation, "silu or gelu_tanh");
  return run(input, rows, gate, up, gate_weight.size(0),
             activation == "silu" ? cpu::Activation::kSilu : cpu::Activation::kGeluTanh);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
}

}  // namespace paged
