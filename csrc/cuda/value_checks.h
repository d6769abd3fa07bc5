// TORCH_PAGED_CHECK=1: values that lie on the device are looked at before each op, which waits for the answer.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>

#include "../value_checks.h"
#include "table_checks.h"
#include "torch_face.h"

namespace paged::cuda {

inline bool checks_values() {
  // Read at every call, so that a process can switch it on where it goes wrong.
  const char* const value = std::getenv("TORCH_PAGED_CHECK");
  return value != nullptr && std::string_view(value) == "1";
}

inline Tensor to_host(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(DeviceType::CPU));
}

// Launches a check with a verdict beside `like`, and tells whether it found something.
template <class Launch>
bool found_bad_value(const Tensor& like, Launch&& launch) {
  Tensor verdict = torch::stable::new_empty(like, {1}, ScalarType::Int);
  STD_CUDA_CHECK(launch(verdict.mutable_data_ptr<int32_t>(), current_stream(like)));
  return *to_host(verdict).const_data_ptr<int32_t>() != 0;
}

}  // namespace paged::cuda
