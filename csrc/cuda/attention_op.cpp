// paged::attention and paged::attention_with_lse on CUDA: unpack, check, allocate, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../attention_arguments.h"
#include "../op_views.h"
#include "attention.h"
#include "torch_face.h"
#include "value_checks.h"

namespace paged::cuda {
namespace {

// A dimension of size 1 is never stepped over, so that its stride may not keep rows from 16-byte boundaries.
CacheStrides used_strides(CacheStrides strides, const Tensor& cache) {
  if (cache.size(0) == 1) strides.block = 0;
  if (cache.size(1) == 1) strides.token = 0;
  if (cache.size(2) == 1) strides.head = 0;
  return strides;
}

AttentionRequest request_of(const AttentionArguments& arguments) {
  check_cuda_number({arguments.query, "query"});
  AttentionRequest request{checked_call(arguments), number_of(arguments.query)};
  AttentionCall& call = request.call;
  call.key = used_strides(call.key, arguments.key_cache);
  call.value = used_strides(call.value, arguments.value_cache);
  if (call.num_tokens <= 1) call.query_token_stride = 0;
  if (call.num_heads <= 1) call.query_head_stride = 0;
  constexpr int64_t kMaxHeads = 65535;  // of a grid's second dimension
  if (call.num_kv_heads > kMaxHeads)
    reject("key_cache", text(call.num_kv_heads, " heads"), text("at most ", kMaxHeads, " heads"));
  request.max_query_len = std::min(arguments.max_query_len, call.num_tokens);
  // Rows past the bound would be left out. More cannot be known without a look at what lies on the device.
  if (call.num_seqs == 0 && call.num_tokens > 0)
    reject("cu_seqlens_q", "0 sequences", text("at least 1 for the ", call.num_tokens, " tokens of query"));
  if (request.max_query_len * call.num_seqs < call.num_tokens)
    reject("max_query_len", text(arguments.max_query_len),
           text("at least ", (call.num_tokens + call.num_seqs - 1) / call.num_seqs, " for ", call.num_tokens,
                " tokens of query in ", call.num_seqs, " sequences"));
  request.max_seq_len = arguments.block_table.size(1) * call.block_size;
  if (arguments.max_seq_len > 0) request.max_seq_len = std::min(request.max_seq_len, arguments.max_seq_len);
  request.num_splits = arguments.num_splits;
  request.deterministic = arguments.deterministic;
  return request;
}

void check_values(const AttentionArguments& arguments, AttentionCall call) {
  const int64_t num_blocks = arguments.key_cache.size(0), max_blocks = arguments.block_table.size(1);
  const bool bad = found_bad_value(arguments.seq_lens, [&](int32_t* verdict, cudaStream_t stream) {
    return launch_check_attention({call, num_blocks, max_blocks, arguments.max_query_len}, verdict, stream);
  });
  if (!bad) return;
  // The CPU's checks find the words.
  const Tensor table = to_host(arguments.block_table), lengths = to_host(arguments.seq_lens);
  const Tensor starts = to_host(arguments.cu_seqlens_q);
  call.block_table = table.const_data_ptr<int32_t>();
  call.table_stride = table.stride(0);
  call.seq_lens = lengths.const_data_ptr<int32_t>();
  call.cu_seqlens_q = starts.const_data_ptr<int32_t>();
  check_positions(call, num_blocks, max_blocks, arguments.max_query_len);
}

Tensor run(const AttentionArguments& arguments, Tensor* lse) {
  AttentionRequest request = request_of(arguments);
  AttentionCall& call = request.call;
  const torch::stable::accelerator::DeviceGuard guard(arguments.query.get_device_index());
  if (checks_values() && call.num_seqs > 0) check_values(arguments, call);
  Tensor out = torch::stable::new_empty(arguments.query, {call.num_tokens, call.num_heads, call.v_head_dim});
  call.out = out.mutable_data_ptr();
  if (lse) {
    *lse = torch::stable::new_empty(arguments.query, {call.num_heads, call.num_tokens}, ScalarType::Float);
    call.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (call.num_tokens == 0 || call.num_heads == 0 || call.num_seqs == 0) return out;

  AttentionPlan plan;
  STD_CUDA_CHECK(plan_attention(request, plan));
  // Freed for the stream's later kernels when this returns; torch's allocator knows the order.
  std::optional<Tensor> workspace;
  if (plan.workspace_floats > 0)
    workspace = torch::stable::new_empty(arguments.query, {plan.workspace_floats}, ScalarType::Float);
  float* const memory = workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
  STD_CUDA_CHECK(launch_attention(plan, memory, current_stream(arguments.query)));
  return out;
}

}  // namespace
}  // namespace paged::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CUDA, m) {
  using Ops = paged::AttentionOps<paged::cuda::run>;
  m.impl("attention", TORCH_BOX(&Ops::attention));
  m.impl("attention_with_lse", TORCH_BOX(&Ops::attention_with_lse));
}
