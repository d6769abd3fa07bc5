// Divides the outputs of one linear layer over the threads.
#include "linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void linear(const Linear& call) {
  MultiplyRows* const multiply_rows = cpu_kernels().multiply_rows;
  const int64_t steps = (call.out_features + kOutputStep - 1) / kOutputStep;
  const int64_t step_bytes = kOutputStep * call.in_features * call.element_size;
  torch::stable::parallel_for(0, steps, grain(step_bytes), [&](int64_t begin, int64_t end) {
    // Kept by the thread: fresh pages for each call would cost as much as a small layer.
    thread_local std::vector<float> scratch;
    const size_t floats = size_t(linear_scratch_floats(call)) + 16;
    if (scratch.size() < floats) scratch.resize(floats);
    float* const aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64 / 4;
    multiply_rows(call, begin * kOutputStep, std::min(end * kOutputStep, call.out_features), aligned);
  });
}

}  // namespace paged::cpu
