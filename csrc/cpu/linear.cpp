// Divides linear layers over the threads.
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
#if defined(__SANITIZE_ADDRESS__)
  std::vector<float>().swap(kept);  // so that a kernel is seen to leave it, whatever calls came before
#endif
  if (kept.size() < size_t(floats) + 16) kept.resize(size_t(floats) + 16);
  return kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64 / 4;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void few_rows(const std::vector<Linear>& calls) {
  const LinearKernels& kernels = cpu_kernels().linear;
  int64_t steps = 0;
  for (const Linear& call : calls) steps += ceil_div(call.out_features, kStep);
  const Linear& first = calls.front();
  const int64_t step_bytes = kStep * first.num_weights() * first.in_features * first.element_size;
  torch::stable::parallel_for(0, steps, grain(step_bytes), [&](int64_t begin, int64_t end) {
    float* const own = scratch(kernels.few_rows_scratch_floats(first));
    int64_t before = 0;
    for (const Linear& call : calls) {
      const int64_t from = std::max(begin - before, int64_t(0)) * kStep;
      const int64_t to = std::min((end - before) * kStep, call.out_features);
      if (from < to) kernels.few_rows(call, from, to, own);
      before += ceil_div(call.out_features, kStep);
    }
  });
}

// Parts of the rows times parts of the outputs.
struct Parts {
  int64_t rows, outputs;
};

// As many parts as make equal work for each thread that has enough of it. Each part packs its rows and its outputs:
// none has few of both unless there are threads left.
Parts divide(const Linear& call) {
  const int64_t work = call.num_rows * call.in_features * call.out_features * call.num_weights();
  const int64_t threads = std::clamp<int64_t>(work / kLeastWork, 1, torch::stable::get_num_threads());
  Parts parts{ceil_div(call.num_rows, kManyRows), 1};
  parts.outputs = std::min(threads / std::gcd(threads, parts.rows), ceil_div(call.out_features, kOutputBlock));
  if (parts.rows * parts.outputs < threads)
    parts.rows = std::min(ceil_div(threads, parts.outputs), ceil_div(call.num_rows, kOutputBlock));
  if (parts.rows * parts.outputs < threads)
    parts.outputs = std::min(ceil_div(threads, parts.rows), ceil_div(call.out_features, kStep));
  return parts;
}

void many_rows(const Linear& call) {
  const LinearKernels& kernels = cpu_kernels().linear;
  const Parts parts = divide(call);
  const int64_t rows = ceil_div(ceil_div(call.num_rows, parts.rows), kStep) * kStep;
  const int64_t outputs = ceil_div(ceil_div(call.out_features, parts.outputs), kStep) * kStep;
  torch::stable::parallel_for(0, parts.rows * parts.outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part % parts.rows * rows, output = part / parts.rows * outputs;
      // Steps may leave nothing for the last parts.
      if (row < call.num_rows && output < call.out_features)
        kernels.many_rows(call, row, std::min(row + rows, call.num_rows), output,
                          std::min(output + outputs, call.out_features),
                          scratch(kernels.many_rows_scratch_floats(call)));
    }
  });
}

}  // namespace

void linear(const std::vector<Linear>& calls) {
  if (!cpu_kernels().linear.has_many_rows(calls.front())) return few_rows(calls);
  for (const Linear& call : calls)
    if (call.out_features > 0) many_rows(call);
}

}  // namespace paged::cpu
