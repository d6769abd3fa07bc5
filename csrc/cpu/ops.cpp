// The torch face of the CPU kernels that move blocks and tokens: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../id_set.h"
#include "../op_checks.h"
#include "../op_views.h"
#include "../value_checks.h"
#include "copy_blocks.h"
#include "gather_cache.h"
#include "merge_attention_states.h"
#include "reshape_and_cache.h"
#include "rope_and_cache.h"

namespace paged {
namespace {

void reshape_and_cache(const Tensor& key, const Tensor& value, Tensor& key_cache, Tensor& value_cache,
                       const Tensor& slot_mapping, const std::optional<Tensor>& key_scale,
                       const std::optional<Tensor>& value_scale) {
  check_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  check_slots(slots, slot_mapping.size(0), key_cache.size(0) * key_cache.size(1));
  check_divisors("key_scale", key_scale);
  check_divisors("value_scale", value_scale);
  const auto store = [&](const Tensor& rows, Tensor& cache, const std::optional<Tensor>& scale, const char* name) {
    const Element element = scale ? number_of(cache) : bytes_of(cache, name);
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
  cpu::rope_and_cache(
      rope_write(query, rotated, cos, sin, interleaved, cache_write(key, key_cache, key_scale, number_of(key_cache)),
                 cache_write(value, value_cache, value_scale, number_of(value_cache))),
      slots);
  return rotated;
}

Tensor gather(const Tensor& cache, const std::optional<Tensor>& scale, const SequenceTable& table, int64_t max_seq_len,
              const char* name) {
  Tensor rows = torch::stable::new_empty(cache, {table.num_seqs, max_seq_len, cache.size(2), cache.size(3)});
  cpu::gather_cache(cache_read(cache, rows, scale, name), table);
  return rows;
}

std::tuple<Tensor, Tensor> gather_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                                        const Tensor& seq_lens, int64_t max_seq_len,
                                        const std::optional<Tensor>& key_scale,
                                        const std::optional<Tensor>& value_scale) {
  check_gather_cache(key_cache, value_cache, block_table, seq_lens, max_seq_len, key_scale, value_scale);
  const int64_t block_size = key_cache.size(1);
  const SequenceTable table = sequence_table(block_table, seq_lens);
  check_sequences(table, block_table.size(1), block_size, key_cache.size(0), max_seq_len);
  return {gather(key_cache, key_scale, table, max_seq_len, "key_cache"),
          gather(value_cache, value_scale, table, max_seq_len, "value_cache")};
}

void copy_blocks(std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, const Tensor& block_mapping) {
  check_copy_blocks(key_caches, value_caches, block_mapping);
  const int64_t* pairs = block_mapping.const_data_ptr<int64_t>();
  const int64_t num_pairs = block_mapping.size(0);
  std::vector<LayerCopy> layers;
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
  std::vector<LayerCopy> layers;
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

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                  const Tensor& lse_b) {
  check_merge_attention_states(out_a, lse_a, out_b, lse_b);
  Tensor out = torch::stable::new_empty(out_a, {out_a.size(0), out_a.size(1), out_a.size(2)});
  Tensor lse = torch::stable::new_empty(lse_a, {out_a.size(1), out_a.size(0)});
  cpu::merge_attention_states(state_merge(out_a, lse_a, out_b, lse_b, out, lse));
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
