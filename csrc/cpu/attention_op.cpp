// paged::attention and paged::attention_with_lse on the CPU: unpack, check, allocate, call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../attention_arguments.h"
#include "../value_checks.h"
#include "attention_float64.h"
#include "attention_plan.h"
#include "dispatch.h"

namespace paged {
namespace {

// Memory of the calling thread that only grows.
float* workspace(int64_t floats) {
  static thread_local std::vector<float> memory;
  constexpr size_t line = 64;
#if defined(__SANITIZE_ADDRESS__)
  std::vector<float>().swap(memory);  // so that a kernel is seen to leave it, whatever calls came before
#endif
  if (memory.size() * sizeof(float) < floats * sizeof(float) + line) memory.resize(floats + line / sizeof(float));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + line - 1) / line * line);
}

void attend_in_double(const AttentionCall& call) {
  torch::stable::parallel_for(0, call.num_tokens * call.num_heads, 1,
                              [&](int64_t begin, int64_t end) { attention_float64(call, begin, end); });
}

void attend(const AttentionCall& call, const AttentionKernels& kernels, const AttentionArguments& arguments) {
  const SplitPolicy policy{
      torch::stable::get_num_threads(),        arguments.num_splits, arguments.deterministic,
      int64_t(arguments.query.element_size()), kernels.prefill_rows, kernels.bytes_per_multiply_add};
  static thread_local AttentionPlan plan_of_thread;
  AttentionPlan& plan = plan_of_thread;
  plan_attention(call, policy, plan);
  const int64_t scratch = kernels.scratch_floats(call);
  float* const partials = workspace(plan.num_threads() * scratch + plan.partial_floats);
  float* const scratches = partials + plan.partial_floats;
  torch::stable::parallel_for(0, plan.num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const AttentionWork* const end_of_thread = plan.work.data() + plan.thread_begin[thread + 1];
      float* const own = scratches + thread * scratch;
      const AttentionWork* work = plan.work.data() + plan.thread_begin[thread];
      while (work < end_of_thread) {
        if (rows_of(*work) > kDecodeRows) {
          kernels.prefill(call, *work++, own, partials);
          continue;
        }
        const AttentionWork* const gang = work++;
        while (work < end_of_thread && work - gang < kGang && differs_in_heads_alone(*gang, *work)) ++work;
        kernels.decode(call, gang, work - gang, end_of_thread, own, partials);
      }
    }
  });
  torch::stable::parallel_for(0, int64_t(plan.merges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.merge(call, plan.work.data() + plan.merges[i].first, plan.merges[i].count, partials);
  });
}

Tensor run(const AttentionArguments& arguments, Tensor* lse) {
  const CpuKernels& kernels = cpu_kernels();
  AttentionCall call = checked_call(arguments);
  const Tensor& query = arguments.query;
  check_positions(call, arguments.key_cache.size(0), arguments.block_table.size(1), arguments.max_query_len);

  Tensor out = torch::stable::new_empty(query, {call.num_tokens, call.num_heads, call.v_head_dim});
  call.out = out.mutable_data_ptr();
  if (lse) {
    *lse = torch::stable::new_empty(query, {call.num_heads, call.num_tokens}, ScalarType::Float);
    call.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (call.num_tokens == 0 || call.num_heads == 0) return out;

  switch (query.scalar_type()) {
    case ScalarType::Double: attend_in_double(call); break;
    case ScalarType::Float: attend(call, kernels.attention_float32, arguments); break;
    case ScalarType::BFloat16: attend(call, kernels.attention_bfloat16, arguments); break;
    default: attend(call, kernels.attention_float16, arguments); break;
  }
  return out;
}

}  // namespace
}  // namespace paged

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  using Ops = paged::AttentionOps<paged::run>;
  m.impl("attention", TORCH_BOX(&Ops::attention));
  m.impl("attention_with_lse", TORCH_BOX(&Ops::attention_with_lse));
}
