// Divides the panels of one linear layer over the threads.
#include "packed_linear.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void packed_linear(const PackedLinear& call) {
  MultiplyPanels* const multiply_panels = cpu_kernels().multiply_panels;
  const int64_t panel_bytes = 2 * kPanel * call.num_pairs() * call.element_size;
  torch::stable::parallel_for(0, call.num_panels(), grain(panel_bytes), [&](int64_t begin, int64_t end) {
    // Kept by the thread: fresh pages for each call would cost as much as a small layer.
    thread_local std::vector<float> scratch;
    const size_t floats = size_t(panels_scratch_floats(call));
    if (scratch.size() < floats) scratch.resize(floats);
    multiply_panels(call, begin, end, scratch.data());
  });
}

}  // namespace paged::cpu
