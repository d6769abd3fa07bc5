// The torch face of the CUDA kernels that move blocks and tokens: checks tensors, launches on torch's current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "../op_views.h"
#include "launchers.h"
#include "swap_blocks.h"
#include "torch_face.h"
#include "value_checks.h"

namespace paged::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_grid(const char* name, int64_t size) {
  if (size > kMaxGrid) reject(name, text("size ", size), text("at most ", kMaxGrid, ", the largest grid"));
}

// Of the values, ranges are looked at, not that no slot is there twice.
void check_slots_on_device(const Tensor& slot_mapping, const Tensor& cache) {
  if (!checks_values()) return;
  const int64_t num_tokens = slot_mapping.size(0), num_slots = cache.size(0) * cache.size(1);
  const bool bad = found_bad_value(slot_mapping, [&](int32_t* verdict, cudaStream_t stream) {
    return launch_check_slots(slot_mapping.const_data_ptr<int64_t>(), num_tokens, num_slots, verdict, stream);
  });
  if (bad) check_slots(to_host(slot_mapping).const_data_ptr<int64_t>(), num_tokens, num_slots);
}

void check_pairs_on_device(const Tensor& block_mapping, const std::vector<LayerCopy>& layers) {
  if (!checks_values()) return;
  const int64_t num_pairs = block_mapping.size(0);
  for (const LayerCopy& layer : layers) {
    const int64_t num_blocks = layer.sizes[0];
    const bool bad = found_bad_value(block_mapping, [&](int32_t* verdict, cudaStream_t stream) {
      return launch_check_pairs(block_mapping.const_data_ptr<int64_t>(), num_pairs, num_blocks, num_blocks, verdict,
                                stream);
    });
    if (bad) check_block_ranges(to_host(block_mapping).const_data_ptr<int64_t>(), num_pairs, num_blocks, num_blocks);
  }
}

void check_sequences_on_device(const Tensor& block_table, const Tensor& seq_lens, const Tensor& cache,
                               int64_t max_seq_len) {
  if (!checks_values()) return;
  const int64_t num_blocks = cache.size(0), max_blocks = block_table.size(1), block_size = cache.size(1);
  const bool bad = found_bad_value(seq_lens, [&](int32_t* verdict, cudaStream_t stream) {
    return launch_check_gather({sequence_table(block_table, seq_lens), num_blocks, max_blocks, block_size, max_seq_len},
                               verdict, stream);
  });
  if (!bad) return;
  const Tensor table = to_host(block_table), lengths = to_host(seq_lens);
  check_sequences(sequence_table(table, lengths), max_blocks, block_size, num_blocks, max_seq_len);
}

void reshape_and_cache(const Tensor& key, const Tensor& value, Tensor& key_cache, Tensor& value_cache,
                       const Tensor& slot_mapping, const std::optional<Tensor>& key_scale,
                       const std::optional<Tensor>& value_scale) {
  check_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  check_grid("slot_mapping", slot_mapping.size(0));
  const Element element = key_scale || value_scale ? number_of(key_cache) : bytes_of(key_cache, "key_cache");
  const DeviceGuard guard(key_cache.get_device_index());
  check_slots_on_device(slot_mapping, key_cache);
  STD_CUDA_CHECK(launch_reshape_and_cache(cache_write(key, key_cache, key_scale, element),
                                          cache_write(value, value_cache, value_scale, element),
                                          slot_mapping.const_data_ptr<int64_t>(), current_stream(key_cache)));
}

Tensor rope_and_cache(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
                      Tensor& key_cache, Tensor& value_cache, const Tensor& slot_mapping, bool interleaved,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  check_cuda_number({key_cache, "key_cache"});
  check_rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  check_grid("slot_mapping", slot_mapping.size(0));
  const DeviceGuard guard(key_cache.get_device_index());
  check_slots_on_device(slot_mapping, key_cache);
  Tensor rotated = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  STD_CUDA_CHECK(launch_rope_and_cache(
      rope_write(query, rotated, cos, sin, interleaved, cache_write(key, key_cache, key_scale, number_of(key_cache)),
                 cache_write(value, value_cache, value_scale, number_of(value_cache))),
      slot_mapping.const_data_ptr<int64_t>(), current_stream(key_cache)));
  return rotated;
}

std::tuple<Tensor, Tensor> gather_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                                        const Tensor& seq_lens, int64_t max_seq_len,
                                        const std::optional<Tensor>& key_scale,
                                        const std::optional<Tensor>& value_scale) {
  check_gather_cache(key_cache, value_cache, block_table, seq_lens, max_seq_len, key_scale, value_scale);
  const DeviceGuard guard(key_cache.get_device_index());
  check_sequences_on_device(block_table, seq_lens, key_cache, max_seq_len);
  const auto rows_of = [&](const Tensor& cache) {
    return torch::stable::new_empty(cache, {block_table.size(0), max_seq_len, cache.size(2), cache.size(3)});
  };
  Tensor key = rows_of(key_cache), value = rows_of(value_cache);
  CacheRead key_read = cache_read(key_cache, key, key_scale, "key_cache");
  CacheRead value_read = cache_read(value_cache, value, value_scale, "value_cache");
  if (key_scale || value_scale) key_read.element = value_read.element = number_of(key_cache);
  STD_CUDA_CHECK(
      launch_gather_cache(key_read, value_read, sequence_table(block_table, seq_lens), current_stream(key_cache)));
  return {key, value};
}

void copy_blocks(std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, const Tensor& block_mapping) {
  check_copy_blocks(key_caches, value_caches, block_mapping);
  check_grid("block_mapping", block_mapping.size(0));
  std::vector<LayerCopy> layers;
  for (const auto* caches : {&key_caches, &value_caches})
    for (const Tensor& cache : *caches)
      if (cache.numel() > 0) layers.push_back(layer_copy(cache, cache));
  const DeviceGuard guard(block_mapping.get_device_index());
  check_pairs_on_device(block_mapping, layers);
  STD_CUDA_CHECK(launch_copy_blocks(layers, block_mapping.const_data_ptr<int64_t>(), block_mapping.size(0),
                                    current_stream(block_mapping)));
}

// At least one side is on a device; the mapping is the host's, and its values are checked as on the CPU.
void swap_blocks(std::vector<Tensor> src, std::vector<Tensor> dst, const Tensor& block_mapping) {
  check_swap_blocks(src, dst, block_mapping);
  const int64_t num_pairs = block_mapping.size(0);
  const int64_t* const pairs = block_mapping.const_data_ptr<int64_t>();
  std::map<int, const Tensor*> devices;
  std::vector<LayerCopy> layers;
  bool within_one = false, on_host = false;
  for (size_t i = 0; i < src.size(); ++i) {
    check_block_ranges(pairs, num_pairs, src[i].size(0), dst[i].size(0));
    if (src[i].numel() > 0 && dst[i].numel() > 0) layers.push_back(layer_copy(src[i], dst[i]));
    within_one = within_one || src[i].const_data_ptr() == dst[i].const_data_ptr();
    for (const Tensor* side : {&src[i], &dst[i]}) {
      on_host = on_host || side->device().is_cpu();
      if (!side->device().is_cpu()) devices[side->get_device_index()] = side;
    }
  }
  if (layers.empty() || num_pairs == 0) return;
  check_destinations(pairs, num_pairs, within_one);
  if (devices.empty()) devices[0] = &dst[0];  // of the GPU that tests emulate
  std::vector<DeviceStream> streams;
  for (const auto& [index, tensor] : devices) streams.push_back({index, current_stream(*tensor)});
  const DeviceGuard guard(devices.begin()->first);
  Tensor pairs_on_device = torch::stable::new_empty(*devices.begin()->second, {num_pairs, 2}, ScalarType::Long);
  torch::stable::copy_(pairs_on_device, block_mapping);
  STD_CUDA_CHECK(
      launch_swap_blocks(layers, pairs, pairs_on_device.const_data_ptr<int64_t>(), num_pairs, on_host, streams));
}

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                  const Tensor& lse_b) {
  check_cuda_number({out_a, "out_a"});
  check_merge_attention_states(out_a, lse_a, out_b, lse_b);
  const DeviceGuard guard(out_a.get_device_index());
  Tensor out = torch::stable::new_empty(out_a, {out_a.size(0), out_a.size(1), out_a.size(2)});
  Tensor lse = torch::stable::new_empty(lse_a, {out_a.size(1), out_a.size(0)});
  STD_CUDA_CHECK(
      launch_merge_attention_states(state_merge(out_a, lse_a, out_b, lse_b, out, lse), current_stream(out_a)));
  return {out, lse};
}

}  // namespace
}  // namespace paged::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CUDA, m) {
  namespace cuda = paged::cuda;
  m.impl("reshape_and_cache", TORCH_BOX(&cuda::reshape_and_cache));
  m.impl("rope_and_cache", TORCH_BOX(&cuda::rope_and_cache));
  m.impl("gather_cache", TORCH_BOX(&cuda::gather_cache));
  m.impl("copy_blocks", TORCH_BOX(&cuda::copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&cuda::swap_blocks));
  m.impl("merge_attention_states", TORCH_BOX(&cuda::merge_attention_states));
}
