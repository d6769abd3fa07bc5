// The torch faces of linear, gated_linear and qkv_linear: unpack tensors, check them, call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

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

// Without `out`.
cpu::Linear layer_of(const Tensor& input, const Rows& rows, cpu::LinearWeight first, cpu::LinearWeight second,
                     int64_t out_features, cpu::Activation activation) {
  return {static_cast<const char*>(input.const_data_ptr()),
          {first, second},
          nullptr,
          number_of(input),
          int64_t(input.element_size()),
          rows.count,
          rows.size,
          out_features,
          rows.stride,
          activation};
}

Tensor run(const Tensor& input, Rows rows, cpu::Linear layer) {
  rows.shape.back() = layer.out_features;
  Tensor out = torch::stable::new_empty(input, rows.shape);
  layer.out = static_cast<char*>(out.mutable_data_ptr());
  if (out.numel() > 0) cpu::linear({layer});
  return out;
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Arg input_arg{input, "input"};
  const Rows rows = rows_of(input_arg, "in_features");
  const cpu::LinearWeight layer = linear_weight({weight, "weight"}, input_arg, rows, bias, "bias");
  return run(input, rows, layer_of(input, rows, layer, {}, weight.size(0), cpu::Activation::kNone));
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
  const cpu::Activation by_name = activation == "silu" ? cpu::Activation::kSilu : cpu::Activation::kGeluTanh;
  return run(input, rows, layer_of(input, rows, gate, up, gate_weight.size(0), by_name));
}

std::tuple<Tensor, Tensor, Tensor> qkv_linear(const Tensor& input, const Tensor& query_weight, const Tensor& key_weight,
                                              const Tensor& value_weight, const std::optional<Tensor>& query_bias,
                                              const std::optional<Tensor>& key_bias,
                                              const std::optional<Tensor>& value_bias, int64_t head_dim) {
  const Arg input_arg{input, "input"};
  if (head_dim <= 0) reject("head_dim", text(head_dim), "positive");
  Rows rows = rows_of(input_arg, "in_features");
  const Arg weights[] = {{query_weight, "query_weight"}, {key_weight, "key_weight"}, {value_weight, "value_weight"}};
  const std::optional<Tensor>* const biases[] = {&query_bias, &key_bias, &value_bias};
  const char* const names_of_biases[] = {"query_bias", "key_bias", "value_bias"};
  std::vector<cpu::Linear> layers;
  std::vector<Tensor> out;
  rows.shape.push_back(head_dim);
  for (int i = 0; i < 3; ++i) {
    const cpu::LinearWeight weight = linear_weight(weights[i], input_arg, rows, *biases[i], names_of_biases[i]);
    const int64_t out_features = weights[i].size(0);
    if (out_features % head_dim != 0)
      reject(weights[i], text(out_features, " out_features"), text("a multiple of head_dim ", head_dim));
    rows.shape[rows.shape.size() - 2] = out_features / head_dim;
    out.push_back(torch::stable::new_empty(input, rows.shape));
    layers.push_back(layer_of(input, rows, weight, {}, out_features, cpu::Activation::kNone));
    layers.back().out = static_cast<char*>(out.back().mutable_data_ptr());
  }
  if (rows.count > 0) cpu::linear(layers);
  return {out[0], out[1], out[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
  m.impl("qkv_linear", TORCH_BOX(&qkv_linear));
}

}  // namespace paged
