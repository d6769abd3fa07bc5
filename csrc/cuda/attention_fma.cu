// The compiled float32 attention kernels.
#include "attention_fma.cuh"
#include "attention_kernels.h"

namespace paged::cuda {
namespace {

template <int kDim, int kRows>
AttentionKernel describe() {
  using Shape = FmaShape<kDim, kRows>;
  return {reinterpret_cast<const void*>(&attention_fma_kernel<Shape>), Shape::kRows, Shape::kKeys, Shape::kThreads,
          Shape::kSharedBytes};
}

}  // namespace

AttentionKernel attention_fma_of(int dim, int rows) {
  if (dim <= 128) return rows <= 16 ? describe<128, 16>() : describe<128, 32>();
  if (dim <= 256) return describe<256, 16>();
  return describe<512, 16>();
}

}  // namespace paged::cuda
