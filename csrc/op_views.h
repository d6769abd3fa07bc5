// Tensors as the kernels see them: puts checked arguments into the structures of cache_calls.h.
#pragma once

#include <optional>

#include "cache_calls.h"
#include "checks.h"

namespace paged {

inline Element bytes_of(const Tensor& tensor, const char* name) {
  switch (tensor.element_size()) {
    case 1: return Element::kBytes1;
    case 2: return Element::kBytes2;
    case 4: return Element::kBytes4;
    case 8: return Element::kBytes8;
    case 16: return Element::kBytes16;
    default: reject(name, text("elements of ", tensor.element_size(), " bytes"), "of 1, 2, 4, 8 or 16 bytes");
  }
}

inline Element number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Element::kFloat64;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: return Element::kFloat32;
  }
}

template <class Byte>
CacheView<Byte> cache_view(Byte* data, const Tensor& cache) {
  // A single element's stride may be anything, and 1 takes the memcpy.
  const int64_t dim_stride = cache.size(3) == 1 ? 1 : cache.stride(3);
  return {data, cache.stride(0), cache.stride(1), cache.stride(2), dim_stride};
}

inline Scale scale_of(const std::optional<Tensor>& scale) {
  if (!scale) return {};
  return {scale->const_data_ptr<float>(), scale->numel() == 1 ? 0 : 1};
}

inline NewRows new_rows(const Tensor& rows) {
  return {static_cast<const char*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1)};
}

inline CacheWrite cache_write(const Tensor& rows, Tensor& cache, const std::optional<Tensor>& scale, Element element) {
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

// `rotated` is what the op returns.
inline RopeWrite rope_write(const Tensor& query, Tensor& rotated, const Tensor& cos, const Tensor& sin,
                            bool interleaved, const CacheWrite& key, const CacheWrite& value) {
  return {new_rows(query),
          static_cast<char*>(rotated.mutable_data_ptr()),
          query.size(1),
          {static_cast<const char*>(cos.const_data_ptr()), static_cast<const char*>(sin.const_data_ptr()),
           cos.stride(0), sin.stride(0), number_of(cos), cos.size(1), interleaved},
          key,
          value};
}

// `rows` is what the op returns.
inline CacheRead cache_read(const Tensor& cache, Tensor& rows, const std::optional<Tensor>& scale, const char* name) {
  return {cache_view(static_cast<const char*>(cache.const_data_ptr()), cache),
          static_cast<char*>(rows.mutable_data_ptr()),
          scale_of(scale),
          scale ? number_of(cache) : bytes_of(cache, name),
          int64_t(cache.element_size()),
          cache.size(2),
          cache.size(3),
          cache.size(1),
          rows.size(1)};
}

inline SequenceTable sequence_table(const Tensor& block_table, const Tensor& seq_lens) {
  return {block_table.const_data_ptr<int32_t>(), block_table.stride(0), seq_lens.const_data_ptr<int32_t>(),
          block_table.size(0)};
}

inline LayerCopy layer_copy(const Tensor& src, const Tensor& dst) {
  LayerCopy layer{static_cast<const char*>(src.const_data_ptr()),
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

inline AttentionState state_of(const Tensor& out, const Tensor& lse) {
  return {static_cast<const char*>(out.const_data_ptr()),
          out.stride(0),
          out.stride(1),
          lse.const_data_ptr<float>(),
          lse.stride(0),
          lse.stride(1)};
}

// `out` and `lse` are what the op returns.
inline StateMerge state_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                              Tensor& out, Tensor& lse) {
  return {state_of(out_a, lse_a),
          state_of(out_b, lse_b),
          static_cast<char*>(out.mutable_data_ptr()),
          lse.mutable_data_ptr<float>(),
          number_of(out_a),
          int64_t(out_a.element_size()),
          out_a.size(0),
          out_a.size(1),
          out_a.size(2)};
}

}  // namespace paged
