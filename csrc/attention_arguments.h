// The arguments of attention and attention_with_lse, for the CPU and for CUDA: checked, and put into an AttentionCall.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "attention_call.h"
#include "checks.h"

namespace paged {

using MaybeTensor = std::optional<Tensor>;

struct AttentionArguments {
  const Tensor &query, &key_cache, &value_cache, &block_table, &seq_lens, &cu_seqlens_q;
  int64_t max_query_len;
  std::optional<double> scale;
  bool causal;
  int64_t sliding_window;
  double softcap;
  const MaybeTensor &alibi_slopes, &sinks, &key_scale, &value_scale;
  int64_t max_seq_len, num_splits;
  bool deterministic;
};

// The two ops, as the dispatcher calls them, over one function that fills in `lse` where it is not null.
template <Tensor (*kRun)(const AttentionArguments& arguments, Tensor* lse)>
struct AttentionOps {
  static Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                          const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                          int64_t max_query_len, std::optional<double> scale, bool causal, int64_t sliding_window,
                          double softcap, const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                          const MaybeTensor& key_scale, const MaybeTensor& value_scale, int64_t max_seq_len,
                          int64_t num_splits, bool deterministic) {
    return kRun(
        {query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_query_len, scale, causal,
         sliding_window, softcap, alibi_slopes, sinks, key_scale, value_scale, max_seq_len, num_splits, deterministic},
        nullptr);
  }

  static std::tuple<Tensor, Tensor> attention_with_lse(const Tensor& query, const Tensor& key_cache,
                                                       const Tensor& value_cache, const Tensor& block_table,
                                                       const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                                                       int64_t max_query_len, std::optional<double> scale, bool causal,
                                                       int64_t sliding_window, double softcap,
                                                       const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                                                       const MaybeTensor& key_scale, const MaybeTensor& value_scale,
                                                       int64_t max_seq_len, int64_t num_splits, bool deterministic) {
    Tensor lse;
    Tensor out = kRun(
        {query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_query_len, scale, causal,
         sliding_window, softcap, alibi_slopes, sinks, key_scale, value_scale, max_seq_len, num_splits, deterministic},
        &lse);
    return {out, lse};
  }
};

inline void check_head_dim(const Arg& arg, int64_t head_dim) {
  if (head_dim < 8 || head_dim > 512 || head_dim % 8)
    reject(arg, text("head_dim ", head_dim), "a multiple of 8 from 8 to 512");
}

inline const float* per_head(const MaybeTensor& tensor, const char* name, const Arg& query) {
  if (!tensor) return nullptr;
  const Arg arg{*tensor, name};
  check_dim(arg, 1, "[num_heads]");
  check_dtype(arg, {ScalarType::Float});
  check_same_device(arg, query);
  check_size(arg, 0, query.size(1), "num_heads of query");
  check_contiguous(arg);
  return static_cast<const float*>(tensor->const_data_ptr());
}

inline StoredScale scale_of(const MaybeTensor& tensor, const char* name, const Arg& cache) {
  if (!tensor) return {nullptr, 0};
  check_scale({*tensor, name}, cache);
  return {static_cast<const float*>(tensor->const_data_ptr()), tensor->size(0) > 1};
}

inline void check_shapes(const Arg& query, const Arg& key_cache, const Arg& value_cache) {
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

inline CacheStrides strides_of_cache(const Tensor& cache) {
  return {cache.stride(0), cache.stride(1), cache.stride(2), cache.size(3) > 1 ? cache.stride(3) : 1};
}

// Checks all but the values of tables and lengths. Leaves `out` and `lse` to the caller.
inline AttentionCall checked_call(const AttentionArguments& a) {
  const Arg query_arg{a.query, "query"}, key_arg{a.key_cache, "key_cache"}, value_arg{a.value_cache, "value_cache"};
  const Arg cu_seqlens_arg{a.cu_seqlens_q, "cu_seqlens_q"};
  check_shapes(query_arg, key_arg, value_arg);
  check_tables({a.block_table, "block_table"}, {a.seq_lens, "seq_lens"}, key_arg);
  check_dim(cu_seqlens_arg, 1, "[num_seqs + 1]");
  check_dtype(cu_seqlens_arg, {ScalarType::Int});
  check_same_device(cu_seqlens_arg, query_arg);
  check_size(cu_seqlens_arg, 0, a.seq_lens.size(0) + 1, "num_seqs + 1");
  check_contiguous(cu_seqlens_arg);
  check_at_least_0("max_query_len", a.max_query_len);
  check_at_least_0("sliding_window", a.sliding_window);
  if (!(a.softcap >= 0) || std::isinf(a.softcap)) reject("softcap", text(a.softcap), "0 (off) or positive and finite");
  if (a.scale && !std::isfinite(*a.scale)) reject("scale", text(*a.scale), "finite");
  check_at_least_0("max_seq_len", a.max_seq_len);
  check_at_least_0("num_splits", a.num_splits);

  AttentionCall call{};
  call.alibi_slopes = per_head(a.alibi_slopes, "alibi_slopes", query_arg);
  call.sinks = per_head(a.sinks, "sinks", query_arg);
  call.key_scale = scale_of(a.key_scale, "key_scale", key_arg);
  call.value_scale = scale_of(a.value_scale, "value_scale", value_arg);
  call.query = a.query.const_data_ptr();
  call.key_cache = a.key_cache.const_data_ptr();
  call.value_cache = a.value_cache.const_data_ptr();
  call.block_table = static_cast<const int32_t*>(a.block_table.const_data_ptr());
  call.seq_lens = static_cast<const int32_t*>(a.seq_lens.const_data_ptr());
  call.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens_q.const_data_ptr());
  call.num_seqs = a.seq_lens.size(0);
  call.num_tokens = a.query.size(0);
  call.num_heads = a.query.size(1);
  call.head_dim = a.query.size(2);
  call.block_size = a.key_cache.size(1);
  call.num_kv_heads = a.key_cache.size(2);
  call.v_head_dim = a.value_cache.size(3);
  call.query_token_stride = a.query.stride(0);
  call.query_head_stride = a.query.stride(1);
  call.table_stride = a.block_table.stride(0);
  call.key = strides_of_cache(a.key_cache);
  call.value = strides_of_cache(a.value_cache);
  call.scale = a.scale ? *a.scale : 1.0 / std::sqrt(double(call.head_dim));
  call.softcap = a.softcap;
  call.sliding_window = std::min(a.sliding_window, int64_t(1) << 31);  // as good as any longer one: a.seq_lens is int32
  call.causal = a.causal;
  return call;
}

}  // namespace paged
