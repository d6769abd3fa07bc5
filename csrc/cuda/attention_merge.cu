// The compiled kernels that merge splits, by element type.
#include "attention_kernels.h"
#include "attention_merge.cuh"

namespace paged::cuda {

MergeKernel attention_merge_of(Element type) {
  const void* function = nullptr;
  switch (type) {
    case Element::kFloat32: function = reinterpret_cast<const void*>(&attention_merge_kernel<float>); break;
    case Element::kBFloat16: function = reinterpret_cast<const void*>(&attention_merge_kernel<__nv_bfloat16>); break;
    default: function = reinterpret_cast<const void*>(&attention_merge_kernel<__half>); break;
  }
  return {function, kMergeWarps, kMergeWarps * kWarpSize};
}

}  // namespace paged::cuda
