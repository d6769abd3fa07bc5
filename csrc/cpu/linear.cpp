// Divides the outputs of one linear layer over the threads.
#include "linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

namespace {

// Kept by the thread: fresh pages for each call would cost as much as a small layer.
float* scratch(int64_t floats) {
  thread_local std::vector<float> kept;
  if (kept.size() < size_t(floats) + 16) kept.resize(size_t(floats) + 16);
  return kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64 / 4;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void few_rows(const Linear& call) {
  MultiplyFewRows* const multiply_few_rows = cpu_kernels().multiply_few_rows;
  const int64_t steps = ceil_div(call.out_features, kOutputStep);
  const int64_t step_bytes = kOutputStep * call.in_features * call.element_size;
  torch::stable::parallel_for(0, steps, grain(step_bytes), [&](int64_t begin, int64_t end) {
    multiply_few_rows(call, begin * kOutputStep, std::min(end * kOutputStep, call.out_features),
                      scratch(few_rows_scratch_floats(call)));
  });
}

// Equal parts of the rows times equal parts of the outputs, as many as make equal numbers for each thread.
void many_rows(const Linear& call) {
  MultiplyManyRows* const multiply_many_rows = cpu_kernels().multiply_many_rows;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_parts = ceil_div(call.num_rows, kManyRows);
  const int64_t most_parts = ceil_div(call.out_features, kOutputBlock);
  const int64_t output_parts = std::min(threads / std::gcd(threads, row_parts), most_parts);
  const int64_t part_rows = ceil_div(ceil_div(call.num_rows, row_parts), kOutputStep) * kOutputStep;
  const int64_t part_outputs = ceil_div(ceil_div(call.out_features, output_parts), kOutputStep) * kOutputStep;
  torch::stable::parallel_for(0, row_parts * output_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part % row_parts * part_rows, output = part / row_parts * part_outputs;
      multiply_many_rows(call, row, std::min(row + part_rows, call.num_rows), output,
                         std::min(output + part_outputs, call.out_features), scratch(kManyRowsScratchFloats));
    }
  });
}

}  // namespace

void linear(const Linear& call) { call.num_rows < kFirstManyRows ? few_rows(call) : many_rows(call); }

}  // namespace paged::cpu
