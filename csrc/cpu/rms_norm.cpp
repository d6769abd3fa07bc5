// Divides the rows of one normalisation over the threads.
#include "rms_norm.h"

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "grain.h"

namespace paged::cpu {

void rms_norm(const RmsNorm& call) {
  NormaliseRows* const normalise_rows = cpu_kernels().normalise_rows;
  torch::stable::parallel_for(0, call.num_rows, grain(2 * call.size * call.element_size),
                              [&](int64_t begin, int64_t end) { normalise_rows(call, begin, end); });
}

}  // namespace paged::cpu
