// What each op demands of its arguments' dtypes, shapes, strides and devices; shared by the CPU and CUDA faces.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "checks.h"

namespace paged {

// Rows `[tokens, num_kv_heads, head_dim]` that go into `cache`.
inline void check_rows_for_cache(const Arg& rows, const Arg& cache, const Arg& slot_mapping) {
  check_dim(rows, 3, "[tokens, num_kv_heads, head_dim]");
  check_same_dtype(rows, cache);
  check_same_device(rows, cache);
  check_size(rows, 0, slot_mapping.size(0), "tokens of slot_mapping");
  check_size(rows, 1, cache.size(2), "num_kv_heads of the cache");
  check_size(rows, 2, cache.size(3), "head_dim of the cache");
  check_last_dim_contiguous(rows);
}

// Without a scale bytes are moved, whatever they mean; a scale needs a dtype to compute in.
inline void check_scales(const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                         const Arg& key_cache) {
  if (key_scale || value_scale) check_floating(key_cache);
  if (key_scale) check_scale({*key_scale, "key_scale"}, key_cache);
  if (value_scale) check_scale({*value_scale, "value_scale"}, key_cache);
}

inline void check_reshape_and_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                    const Tensor& value_cache, const Tensor& slot_mapping,
                                    const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const Arg keys{key_cache, "key_cache"}, values{value_cache, "value_cache"}, slots{slot_mapping, "slot_mapping"};
  check_caches(keys, values);
  check_not_expanded(keys);
  check_not_expanded(values);
  check_dim(slots, 1, "[tokens]");
  check_dtype(slots, {ScalarType::Long});
  check_same_device(slots, keys);
  check_contiguous(slots);
  check_rows_for_cache({key, "key"}, keys, slots);
  check_rows_for_cache({value, "value"}, values, slots);
  check_scales(key_scale, value_scale, keys);
}

// As many as attention's head_dim.
constexpr int64_t kMaxRotaryDim = 512;

// Rows `[tokens, rotary_dim]` that turn what goes into `cache`.
inline void check_angles(const Arg& cos, const Arg& sin, const Arg& cache, const Arg& slot_mapping) {
  check_dim(cos, 2, "[tokens, rotary_dim]");
  const ScalarType dtype = cache.tensor.scalar_type();
  if (dtype == ScalarType::Float) {
    check_dtype(cos, {dtype});
  } else {
    check_dtype(cos, {dtype, ScalarType::Float});
  }
  check_same_device(cos, cache);
  check_size(cos, 0, slot_mapping.size(0), "tokens of slot_mapping");
  const int64_t rotary_dim = cos.size(1), head_dim = cache.size(3);
  if (rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2)
    reject(cos, text("rotary_dim ", rotary_dim), text("even and from 2 to ", head_dim, " (head_dim of the cache)"));
  if (rotary_dim > kMaxRotaryDim) reject(cos, text("rotary_dim ", rotary_dim), text("at most ", kMaxRotaryDim));
  check_last_dim_contiguous(cos);
  check_dim(sin, 2, "[tokens, rotary_dim]");
  check_same_dtype(sin, cos);
  check_same_device(sin, cos);
  check_size(sin, 0, cos.size(0), "tokens of cos");
  check_size(sin, 1, rotary_dim, "rotary_dim of cos");
  check_last_dim_contiguous(sin);
}

inline void check_rope_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                                 const Tensor& sin, const Tensor& key_cache, const Tensor& value_cache,
                                 const Tensor& slot_mapping, const std::optional<Tensor>& key_scale,
                                 const std::optional<Tensor>& value_scale) {
  const Arg queries{query, "query"}, keys{key_cache, "key_cache"}, slots{slot_mapping, "slot_mapping"};
  check_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  check_floating(keys);
  check_dim(queries, 3, "[tokens, num_heads, head_dim]");
  check_same_dtype(queries, keys);
  check_same_device(queries, keys);
  check_size(queries, 0, slots.size(0), "tokens of slot_mapping");
  check_size(queries, 2, keys.size(3), "head_dim of the cache");
  check_last_dim_contiguous(queries);
  check_angles({cos, "cos"}, {sin, "sin"}, keys, slots);
}

inline void check_gather_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                               const Tensor& seq_lens, int64_t max_seq_len, const std::optional<Tensor>& key_scale,
                               const std::optional<Tensor>& value_scale) {
  const Arg keys{key_cache, "key_cache"};
  check_caches(keys, {value_cache, "value_cache"});
  check_tables({block_table, "block_table"}, {seq_lens, "seq_lens"}, keys);
  check_at_least_0("max_seq_len", max_seq_len);
  constexpr int64_t longest = std::numeric_limits<int32_t>::max();  // seq_lens is int32
  if (max_seq_len > longest) reject("max_seq_len", text(max_seq_len), text("at most ", longest));
  check_scales(key_scale, value_scale, keys);
}

inline void check_block_mapping(const Arg& block_mapping) {
  check_dim(block_mapping, 2, "[n, 2] (source, destination)");
  check_size(block_mapping, 1, 2, "source, destination");
  check_dtype(block_mapping, {ScalarType::Long});
  check_contiguous(block_mapping);
}

inline void check_copied_caches(const char* name, const std::vector<Tensor>& caches, const Arg& block_mapping) {
  for (size_t layer = 0; layer < caches.size(); ++layer) {
    const Arg cache{caches[layer], name, int64_t(layer)};
    check_dim(cache, 4, "[num_blocks, block_size, num_kv_heads, head_dim]");
    check_same_device(cache, block_mapping);
    check_not_expanded(cache);
  }
}

inline void check_copy_blocks(const std::vector<Tensor>& key_caches, const std::vector<Tensor>& value_caches,
                              const Tensor& block_mapping) {
  const Arg mapping{block_mapping, "block_mapping"};
  check_block_mapping(mapping);
  check_copied_caches("key_caches", key_caches, mapping);
  check_copied_caches("value_caches", value_caches, mapping);
  if (key_caches.size() != value_caches.size())
    reject("value_caches", text(value_caches.size(), " layers"), text(key_caches.size(), ", like key_caches"));
}

inline void check_swap_blocks(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                              const Tensor& block_mapping) {
  check_block_mapping({block_mapping, "block_mapping"});
  if (src.size() != dst.size()) reject("dst", text(dst.size(), " tensors"), text(src.size(), ", like src"));
  for (size_t layer = 0; layer < src.size(); ++layer) {
    const Arg from{src[layer], "src", int64_t(layer)}, to{dst[layer], "dst", int64_t(layer)};
    check_dim(from, 4, "[num_blocks, block_size, num_kv_heads, head_dim]");
    check_dim(to, 4, "[num_blocks, block_size, num_kv_heads, head_dim]");
    check_same_dtype(to, from);
    check_size(to, 1, from.size(1), "block_size of src");
    check_size(to, 2, from.size(2), "num_kv_heads of src");
    check_size(to, 3, from.size(3), "head_dim of src");
    check_not_expanded(to);
  }
}

inline void check_merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                         const Tensor& lse_b) {
  const Arg a{out_a, "out_a"}, b{out_b, "out_b"};
  check_dim(a, 3, "[tokens, num_heads, v_head_dim]");
  check_floating(a);
  check_last_dim_contiguous(a);
  check_dim(b, 3, "[tokens, num_heads, v_head_dim]");
  check_same_dtype(b, a);
  check_same_device(b, a);
  check_size(b, 0, a.size(0), "tokens of out_a");
  check_size(b, 1, a.size(1), "num_heads of out_a");
  check_size(b, 2, a.size(2), "v_head_dim of out_a");
  check_last_dim_contiguous(b);
  for (const Arg& lse : {Arg{lse_a, "lse_a"}, Arg{lse_b, "lse_b"}}) {
    check_dim(lse, 2, "[num_heads, tokens]");
    check_dtype(lse, {ScalarType::Float});
    check_same_device(lse, a);
    check_size(lse, 0, a.size(1), "num_heads of out_a");
    check_size(lse, 1, a.size(0), "tokens of out_a");
  }
}

}  // namespace paged
