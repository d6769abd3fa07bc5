// What every torch face of a CUDA kernel needs: torch's current stream, and which types are computed with.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "weak.h"

namespace paged::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The types that are computed with on CUDA.
inline void check_cuda_number(const Arg& arg) {
  check_dtype(arg, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

}  // namespace paged::cuda
