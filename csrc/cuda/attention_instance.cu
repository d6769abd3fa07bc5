// The tensor-core attention kernels of one dimension and element type, which the build names.
#include "attention_kernels.h"
#include "attention_tile.cuh"

namespace paged::cuda {
namespace {

template <typename T, int kDim, int kRows>
AttentionKernel describe() {
  if constexpr (has_tile_rows(kDim, kRows)) {
    using Shape = TileShape<kDim, kRows>;
    return {reinterpret_cast<const void*>(&attention_tile_kernel<T, Shape>), kRows, Shape::kKeys, Shape::kThreads,
            Shape::kSharedBytes};
  } else {
    return {};
  }
}

}  // namespace

template <typename T, int kDim>
AttentionKernel attention_tile_of(int rows) {
  switch (rows) {
    case 16: return describe<T, kDim, 16>();
    case 32: return describe<T, kDim, 32>();
    case 64: return describe<T, kDim, 64>();
    case 128: return describe<T, kDim, 128>();
    default: return {};
  }
}

template AttentionKernel attention_tile_of<PAGED_ELEMENT, PAGED_DIM>(int rows);

}  // namespace paged::cuda
