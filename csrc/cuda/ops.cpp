// The torch face of the CUDA kernels: unpacks tensors, checks them, launches on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../op_checks.h"
#include "reshape_and_cache.h"
#include "weak.h"

namespace paged {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: return ElementType::kFloat32;
  }
}

NewRows new_rows(const Tensor& rows) { return {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.size(2)}; }

CacheRows cache_rows(Tensor& cache) {
  return {cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3)};
}

Scale scale_rows(const std::optional<Tensor>& scale) {
  if (!scale) return {nullptr, 0};
  return {scale->const_data_ptr<float>(), scale->numel() == 1 ? 0 : 1};
}

void reshape_and_cache(const Tensor& key, const Tensor& value, Tensor& key_cache, Tensor& value_cache,
                       const Tensor& slot_mapping, const std::optional<Tensor>& key_scale,
                       const std::optional<Tensor>& value_scale) {
  check_dtype({key_cache, "key_cache"}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale);
  const int64_t num_tokens = slot_mapping.size(0);
  if (num_tokens > std::numeric_limits<int32_t>::max())
    reject("slot_mapping", text("size ", num_tokens), "less than 2^31, the largest grid");

  torch::stable::accelerator::DeviceGuard guard(key_cache.get_device_index());
  const ReshapeAndCache call{new_rows(key),
                             new_rows(value),
                             cache_rows(key_cache),
                             cache_rows(value_cache),
                             scale_rows(key_scale),
                             scale_rows(value_scale),
                             slot_mapping.const_data_ptr<int64_t>(),
                             num_tokens,
                             key_cache.size(2),
                             key_cache.size(1),
                             element_type(key_cache)};
  STD_CUDA_CHECK(launch_reshape_and_cache(call, current_stream(key_cache)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CUDA, m) { m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache)); }

}  // namespace paged
