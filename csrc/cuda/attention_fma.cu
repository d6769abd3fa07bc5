// The compiled float32 attention kernels.
#include "attention_fma.cuh"
#include "attention_kernels.h"

namespace paged::cuda {
namespace {

template <int kDim>
AttentionKernel describe() {
  using Shape = FmaShape<kDim>;
  return {reinterpret_cast<const void*>(&attention_fma_kernel<Shape>), Shape::kRows, Shape::kKeys, Shape::kThreads,
          Shape::kSharedBytes};
}

}  // namespace

AttentionKernel attention_fma_of(int dim) {
  if (dim <= 128) return describe<128>();
  if (dim <= 256) return describe<256>();
  return describe<512>();
}

}  // namespace paged::cuda
