// The torch face of the CPU kernels that move blocks and tokens: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "../op_checks.h"
#include "copy_blocks.h"
#include "gather_cache.h"
#include "id_set.h"
#include "merge_attention_states.h"
#include "reshape_and_cache.h"
#include "rope_and_cache.h"

namespace paged {
namespace {

cpu::Element bytes_of(const Tensor& tensor, const char* name) {
  switch (tensor.element_size()) {
    case 1: return cpu::Element::kBytes1;
    case 2: return cpu::Element::kBytes2;
    case 4: return cpu::Element::kBytes4;
    case 8: return cpu::Element::kBytes8;
    case 16: return cpu::Element::kBytes16;
    default: reject(name, text("elements of ", tensor.element_size(), " bytes"), "of 1, 2, 4, 8 or 16 bytes");
  }
}

cpu::Element number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return cpu::Element::kFloat64;
    case ScalarType::BFloat16: return cpu::Element::kBFloat16;
    case ScalarType::Half: return cpu::Element::kFloat16;
    default: return cpu::Element::kFloat32;
  }
}

template <class Byte>
cpu::CacheView<Byte> cache_view(Byte* data, const Tensor& cache) {
  // A single element's stride may be anything, and 1 takes the memcpy.
  const int64_t dim_stride = cache.size(3) == 1 ? 1 : cache.stride(3);
  return {data, cache.stride(0), cache.stride(1), cache.stride(2), dim_stride};
}

cpu::Scale scale_of(const std::optional<Tensor>& scale) {
  if (!scale) return {};
  return {scale->const_data_ptr<float>(), scale->numel() == 1 ? 0 : 1};
}

void check_divisors(const char* name, const std::optional<Tensor>& scale) {
  if (!scale) return;
  const float* values = scale->const_data_ptr<float>();
  for (int64_t i = 0; i < scale->numel(); ++i)
    if (!std::isfinite(values[i]) || values[i] == 0)
      reject(name, text("value ", values[i], " at [", i, "]"),
             "finite and not 0, as keys and values are divided by it");
}

void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
  bool ascending = true;
  int64_t last = -1;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots[t] < -1 || slots[t] >= num_slots)
      reject("slot_mapping", text("value ", slots[t], " at [", t, "]"),
             text("in [-1, ", num_slots, ") (num_blocks * block_size)"));
    if (slots[t] < 0) continue;
    ascending = ascending && slots[t] > last;
    last = slots[t];
  }
  if (ascending) return;
  IdSet seen(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t)
    if (slots[t] >= 0 && !seen.insert(slots[t]))
      reject("slot_mapping", text("value ", slots[t], " at [", t, "] and before"), "no slot twice");
}

cpu::NewRows new_rows(const Tensor& rows) {
  return {static_cast<const char*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1)};
}

cpu::CacheWrite cache_write(const Tensor& rows, Tensor& cache, const std::optional<Tensor>& scale,
                            cpu::Element element) {
  return {new_rows(rows),
          cache_view(static_cast<char*>(cache.mutable_data_ptr()), cache),
          scale_of(scale),
          element,
          int64_t(cache.element_size()),
          rows.size(0),
          cache.size(2),
          cache.size(3),
          cache.size(1)};
}

void reshape_and_cache(const Tensor& key, const Tensor& value, Tensor& key_cache, Tensor& value_cache,
                       const Tensor& slot_mapping, const std::optional<Tensor>& key_scale,
                       const std::optional<Tensor>& value_scale) {
  check_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  check_slots(slots, slot_mapping.size(0), key_cache.size(0) * key_cache.size(1));
  check_divisors("key_scale", key_scale);
  check_divisors("value_scale", value_scale);
  const auto store = [&](const Tensor& rows, Tensor& cache, const std::optional<Tensor>& scale, const char* name) {
    const cpu::Element element = scale ? number_of(cache) : bytes_of(cache, name);
    cpu::reshape_and_cache(cache_write(rows, cache, scale, element), slots);
  };
  store(key, key_cache, key_scale, "key_cache");
  store(value, value_cache, value_scale, "value_cache");
}

Tensor rope_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
                      Tensor& key_cache, Tensor& value_cache, const Tensor& slot_mapping, bool interleaved,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  check_rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  static_assert(kMaxRotaryDim <= cpu::kMaxRotaryDim);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  check_slots(slots, slot_mapping.size(0), key_cache.size(0) * key_cache.size(1));
  check_divisors("key_scale", key_scale);
  check_divisors("value_scale", value_scale);
  Tensor rotated = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  cpu::rope_and_cache({new_rows(query),
                       static_cast<char*>(rotated.mutable_data_ptr()),
                       query.size(1),
                       {static_cast<const char*>(cos.const_data_ptr()), static_cast<const char*>(sin.const_data_ptr()),
                        cos.stride(0), sin.stride(0), number_of(cos), cos.size(1), interleaved},
                       cache_write(key, key_cache, key_scale, number_of(key_cache)),
                       cache_write(value, value_cache, value_scale, number_of(value_cache))},
                      slots);
  return rotated;
}

Tensor gather(const Tensor& cache, const std::optional<Tensor>& scale, const cpu::SequenceTable& table,
              int64_t max_seq_len, const char* name) {
  Tensor rows = torch::stable::new_empty(cache, {table.num_seqs, max_seq_len, cache.size(2), cache.size(3)});
  cpu::gather_cache(
      {cache_view(static_cast<const char*>(cache.const_data_ptr()), cache), static_cast<char*>(rows.mutable_data_ptr()),
       scale_of(scale), scale ? number_of(cache) : bytes_of(cache, name), int64_t(cache.element_size()), cache.size(2),
       cache.size(3), cache.size(1), max_seq_len},
      table);
  return rows;
}

std::tuple<Tensor, Tensor> gather_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                                        const Tensor& seq_lens, int64_t max_seq_len,
                                        const std::optional<Tensor>& key_scale,
                                        const std::optional<Tensor>& value_scale) {
  check_gather_cache(key_cache, value_cache, block_table, seq_lens, max_seq_len, key_scale, value_scale);
  const int64_t block_size = key_cache.size(1);
  const cpu::SequenceTable table{block_table.const_data_ptr<int32_t>(), block_table.stride(0),
                                 seq_lens.const_data_ptr<int32_t>(), block_table.size(0)};
  check_seq_lens(table.seq_lens, table.num_seqs, block_table.size(1), block_size);
  for (int64_t s = 0; s < table.num_seqs; ++s) {
    if (table.seq_lens[s] > max_seq_len)
      reject("max_seq_len", text(max_seq_len), text("at least ", table.seq_lens[s], ", the length of sequence ", s));
    check_block_ids(table.block_table + s * table.row_stride, s, 0,
                    (int64_t(table.seq_lens[s]) + block_size - 1) / block_size, key_cache.size(0));
  }
  return {gather(key_cache, key_scale, table, max_seq_len, "key_cache"),
          gather(value_cache, value_scale, table, max_seq_len, "value_cache")};
}

// Every source is a block of `src` and every destination one of `dst`.
void check_block_ranges(const int64_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks) {
  for (int64_t i = 0; i < num_pairs; ++i)
    for (int side = 0; side < 2; ++side) {
      const int64_t id = pairs[2 * i + side], num_blocks = side ? dst_blocks : src_blocks;
      if (id < 0 || id >= num_blocks)
        reject("block_mapping", text("value ", id, " at [", i, ", ", side, "]"),
               text("in [0, ", num_blocks, ") (num_blocks)"));
    }
}

// Call after check_block_ranges: the set takes no negative id.
void check_destinations(const int64_t* pairs, int64_t num_pairs, bool sources_are_destinations) {
  IdSet destinations(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i)
    if (!destinations.insert(pairs[2 * i + 1]))
      reject("block_mapping", text("destination ", pairs[2 * i + 1], " at [", i, ", 1] and before"),
             "no destination twice");
  for (int64_t i = 0; sources_are_destinations && i < num_pairs; ++i)
    if (destinations.contains(pairs[2 * i]))
      reject("block_mapping", text("source ", pairs[2 * i], " at [", i, ", 0] is a destination too"),
             "no block on both sides");
}

cpu::LayerCopy layer_copy(const Tensor& src, const Tensor& dst) {
  cpu::LayerCopy layer{static_cast<const char*>(src.const_data_ptr()),
                       static_cast<char*>(dst.mutable_data_ptr()),
                       {},
                       {},
                       {},
                       int64_t(src.element_size())};
  for (int dim = 0; dim < 4; ++dim) {
    layer.sizes[dim] = src.size(dim);
    layer.src_strides[dim] = src.stride(dim) * layer.element_size;
    layer.dst_strides[dim] = dst.stride(dim) * layer.element_size;
  }
  return layer;
}

void copy_blocks(std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, const Tensor& block_mapping) {
  check_copy_blocks(key_caches, value_caches, block_mapping);
  const int64_t* pairs = block_mapping.const_data_ptr<int64_t>();
  const int64_t num_pairs = block_mapping.size(0);
  std::vector<cpu::LayerCopy> layers;
  for (const auto* caches : {&key_caches, &value_caches})
    for (const Tensor& cache : *caches) {
      check_block_ranges(pairs, num_pairs, cache.size(0), cache.size(0));
      layers.push_back(layer_copy(cache, cache));
    }
  if (layers.empty()) return;
  check_destinations(pairs, num_pairs, true);
  cpu::copy_blocks(layers, pairs, num_pairs);
}

void swap_blocks(std::vector<Tensor> src, std::vector<Tensor> dst, const Tensor& block_mapping) {
  check_swap_blocks(src, dst, block_mapping);
  const int64_t* pairs = block_mapping.const_data_ptr<int64_t>();
  const int64_t num_pairs = block_mapping.size(0);
  std::vector<cpu::LayerCopy> layers;
  bool within_one = false;
  for (size_t i = 0; i < src.size(); ++i) {
    check_block_ranges(pairs, num_pairs, src[i].size(0), dst[i].size(0));
    layers.push_back(layer_copy(src[i], dst[i]));
    within_one = within_one || layers.back().src == layers.back().dst;
  }
  if (layers.empty()) return;
  check_destinations(pairs, num_pairs, within_one);
  cpu::copy_blocks(layers, pairs, num_pairs);
}

cpu::AttentionState state_of(const Tensor& out, const Tensor& lse) {
  return {static_cast<const char*>(out.const_data_ptr()),
          out.stride(0),
          out.stride(1),
          lse.const_data_ptr<float>(),
          lse.stride(0),
          lse.stride(1)};
}

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                  const Tensor& lse_b) {
  check_merge_attention_states(out_a, lse_a, out_b, lse_b);
  const int64_t num_tokens = out_a.size(0), num_heads = out_a.size(1), head_dim = out_a.size(2);
  Tensor out = torch::stable::new_empty(out_a, {num_tokens, num_heads, head_dim});
  Tensor lse = torch::stable::new_empty(lse_a, {num_heads, num_tokens});
  cpu::merge_attention_states({state_of(out_a, lse_a), state_of(out_b, lse_b),
                               static_cast<char*>(out.mutable_data_ptr()), lse.mutable_data_ptr<float>(),
                               number_of(out_a), int64_t(out_a.element_size()), num_tokens, num_heads, head_dim});
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("rope_and_cache", TORCH_BOX(&rope_and_cache));
  m.impl("gather_cache", TORCH_BOX(&gather_cache));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
}

}  // namespace paged
