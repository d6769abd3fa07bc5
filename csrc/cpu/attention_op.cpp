// paged::attention and paged::attention_with_lse on the CPU: unpack, check, allocate, call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "attention.h"
#include "attention_float64.h"
#include "attention_plan.h"
#include "dispatch.h"

namespace paged {
namespace {

using MaybeTensor = std::optional<Tensor>;

void check_head_dim(const Arg& arg, int64_t head_dim) {
  if (head_dim < 8 || head_dim > 512 || head_dim % 8)
    reject(arg, text("head_dim ", head_dim), "a multiple of 8 from 8 to 512");
}

const float* per_head(const MaybeTensor& tensor, const char* name, const Arg& query) {
  if (!tensor) return nullptr;
  const Arg arg{*tensor, name};
  check_dim(arg, 1, "[num_heads]");
  check_dtype(arg, {ScalarType::Float});
  check_same_device(arg, query);
  check_size(arg, 0, query.size(1), "num_heads of query");
  check_contiguous(arg);
  return static_cast<const float*>(tensor->const_data_ptr());
}

StoredScale scale_of(const MaybeTensor& tensor, const char* name, const Arg& cache) {
  if (!tensor) return {nullptr, 0};
  check_scale({*tensor, name}, cache);
  return {static_cast<const float*>(tensor->const_data_ptr()), tensor->size(0) > 1};
}

void check_shapes(const Arg& query, const Arg& key_cache, const Arg& value_cache) {
  check_dim(query, 3, "[tokens, num_heads, head_dim]");
  check_floating(query);
  check_caches(key_cache, value_cache);
  check_same_dtype(key_cache, query);
  check_same_device(key_cache, query);
  check_head_dim(query, query.size(2));
  check_head_dim(value_cache, value_cache.size(3));
  check_size(key_cache, 3, query.size(2), "head_dim of query");
  check_last_dim_contiguous(query);
  if (query.size(1) % key_cache.size(2))
    reject(query, text(query.size(1), " heads"), text("a multiple of num_kv_heads ", key_cache.size(2)));
}

void check_positions(const AttentionCall& call, int64_t num_blocks, int64_t max_blocks, int64_t max_query_len) {
  check_cu_seqlens(call.cu_seqlens_q, call.num_seqs, call.num_tokens, max_query_len);
  check_seq_lens(call.seq_lens, call.num_seqs, max_blocks, call.block_size);
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t count = call.cu_seqlens_q[s + 1] - call.cu_seqlens_q[s];
    const int64_t seq_len = call.seq_lens[s];
    const KeyRange keys = visible_keys(call, seq_len - count, count, seq_len);
    if (keys.begin < keys.end)
      check_block_ids(call.block_table + s * call.table_stride, s, keys.begin / call.block_size,
                      (keys.end - 1) / call.block_size + 1, num_blocks);
  }
}

CacheStrides strides_of_cache(const Tensor& cache) {
  return {cache.stride(0), cache.stride(1), cache.stride(2), cache.size(3) > 1 ? cache.stride(3) : 1};
}

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

void attend(const AttentionCall& call, const AttentionKernels& kernels, const SplitPolicy& policy) {
  static thread_local AttentionPlan plan_of_thread;
  AttentionPlan& plan = plan_of_thread;
  plan_attention(call, policy, plan);
  const int64_t scratch = scratch_floats(call);
  float* const partials = workspace(plan.num_threads() * scratch + plan.partial_floats);
  float* const scratches = partials + plan.partial_floats;
  torch::stable::parallel_for(0, plan.num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = plan.thread_begin[thread]; i < plan.thread_begin[thread + 1]; ++i) {
        const AttentionWork& work = plan.work[i];
        const AttendPiece attend_piece = rows_of(work) <= kDecodeRows ? kernels.decode : kernels.prefill;
        attend_piece(call, work, scratches + thread * scratch, partials);
      }
  });
  torch::stable::parallel_for(0, int64_t(plan.merges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.merge(call, plan.work.data() + plan.merges[i].first, plan.merges[i].count, partials);
  });
}

// `lse` is filled in where it is not null.
Tensor run(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
           const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_query_len, std::optional<double> scale,
           bool causal, int64_t sliding_window, double softcap, const MaybeTensor& alibi_slopes,
           const MaybeTensor& sinks, const MaybeTensor& key_scale, const MaybeTensor& value_scale, int64_t max_seq_len,
           int64_t num_splits, bool deterministic, Tensor* lse) {
  const CpuKernels& kernels = cpu_kernels();
  const Arg query_arg{query, "query"}, key_arg{key_cache, "key_cache"}, value_arg{value_cache, "value_cache"};
  const Arg cu_seqlens_arg{cu_seqlens_q, "cu_seqlens_q"};
  check_shapes(query_arg, key_arg, value_arg);
  check_tables({block_table, "block_table"}, {seq_lens, "seq_lens"}, key_arg);
  check_dim(cu_seqlens_arg, 1, "[num_seqs + 1]");
  check_dtype(cu_seqlens_arg, {ScalarType::Int});
  check_same_device(cu_seqlens_arg, query_arg);
  check_size(cu_seqlens_arg, 0, seq_lens.size(0) + 1, "num_seqs + 1");
  check_contiguous(cu_seqlens_arg);
  check_at_least_0("max_query_len", max_query_len);
  check_at_least_0("sliding_window", sliding_window);
  if (!(softcap >= 0) || std::isinf(softcap)) reject("softcap", text(softcap), "0 (off) or positive and finite");
  if (scale && !std::isfinite(*scale)) reject("scale", text(*scale), "finite");
  check_at_least_0("max_seq_len", max_seq_len);
  check_at_least_0("num_splits", num_splits);

  AttentionCall call{};
  call.alibi_slopes = per_head(alibi_slopes, "alibi_slopes", query_arg);
  call.sinks = per_head(sinks, "sinks", query_arg);
  call.key_scale = scale_of(key_scale, "key_scale", key_arg);
  call.value_scale = scale_of(value_scale, "value_scale", value_arg);
  call.query = query.const_data_ptr();
  call.key_cache = key_cache.const_data_ptr();
  call.value_cache = value_cache.const_data_ptr();
  call.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  call.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  call.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  call.num_seqs = seq_lens.size(0);
  call.num_tokens = query.size(0);
  call.num_heads = query.size(1);
  call.head_dim = query.size(2);
  call.block_size = key_cache.size(1);
  call.num_kv_heads = key_cache.size(2);
  call.v_head_dim = value_cache.size(3);
  call.query_token_stride = query.stride(0);
  call.query_head_stride = query.stride(1);
  call.table_stride = block_table.stride(0);
  call.key = strides_of_cache(key_cache);
  call.value = strides_of_cache(value_cache);
  call.scale = scale ? *scale : 1.0 / std::sqrt(double(call.head_dim));
  call.softcap = softcap;
  call.sliding_window = std::min(sliding_window, int64_t(1) << 31);  // as good as any longer one: seq_lens is int32
  call.causal = causal;
  check_positions(call, key_cache.size(0), block_table.size(1), max_query_len);

  const SplitPolicy policy{torch::stable::get_num_threads(), num_splits, deterministic, int64_t(query.element_size())};

  Tensor out = torch::stable::new_empty(query, {call.num_tokens, call.num_heads, call.v_head_dim});
  call.out = out.mutable_data_ptr();
  if (lse) {
    *lse = torch::stable::new_empty(query, {call.num_heads, call.num_tokens}, ScalarType::Float);
    call.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (call.num_tokens == 0 || call.num_heads == 0) return out;

  switch (query.scalar_type()) {
    case ScalarType::Double: attend_in_double(call); break;
    case ScalarType::Float: attend(call, kernels.attention_float32, policy); break;
    case ScalarType::BFloat16: attend(call, kernels.attention_bfloat16, policy); break;
    default: attend(call, kernels.attention_float16, policy); break;
  }
  return out;
}

std::tuple<Tensor, Tensor> attention_with_lse(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                              const Tensor& block_table, const Tensor& seq_lens,
                                              const Tensor& cu_seqlens_q, int64_t max_query_len,
                                              std::optional<double> scale, bool causal, int64_t sliding_window,
                                              double softcap, const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                                              const MaybeTensor& key_scale, const MaybeTensor& value_scale,
                                              int64_t max_seq_len, int64_t num_splits, bool deterministic) {
  Tensor lse;
  Tensor out = run(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_query_len, scale, causal,
                   sliding_window, softcap, alibi_slopes, sinks, key_scale, value_scale, max_seq_len, num_splits,
                   deterministic, &lse);
  return {out, lse};
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                 const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_query_len, std::optional<double> scale,
                 bool causal, int64_t sliding_window, double softcap, const MaybeTensor& alibi_slopes,
                 const MaybeTensor& sinks, const MaybeTensor& key_scale, const MaybeTensor& value_scale,
                 int64_t max_seq_len, int64_t num_splits, bool deterministic) {
  return run(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_query_len, scale, causal,
             sliding_window, softcap, alibi_slopes, sinks, key_scale, value_scale, max_seq_len, num_splits,
             deterministic, nullptr);
}

}  // namespace
}  // namespace paged

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  m.impl("attention", TORCH_BOX(&paged::attention));
  m.impl("attention_with_lse", TORCH_BOX(&paged::attention_with_lse));
}
