// Plans the copy of a block in the longest runs that are contiguous on both sides.
#pragma once

#include <algorithm>
#include <vector>

#include "cache_calls.h"

namespace paged {

inline BlockLoops plan_loops(const LayerCopy& layer) {
  std::vector<int> dims;
  for (int dim = 1; dim < 4; ++dim)
    if (layer.sizes[dim] != 1) dims.push_back(dim);
  std::sort(dims.begin(), dims.end(), [&](int a, int b) { return layer.dst_strides[a] > layer.dst_strides[b]; });

  BlockLoops loops;
  loops.run_bytes = layer.element_size;
  while (!dims.empty() && layer.src_strides[dims.back()] == loops.run_bytes &&
         layer.dst_strides[dims.back()] == loops.run_bytes) {
    loops.run_bytes *= layer.sizes[dims.back()];
    dims.pop_back();
  }
  for (size_t i = 0; i < dims.size(); ++i) {
    loops.sizes[i] = layer.sizes[dims[i]];
    loops.src_strides[i] = layer.src_strides[dims[i]];
    loops.dst_strides[i] = layer.dst_strides[dims[i]];
  }
  // A cache without elements may have no address, and memcpy takes no null pointer even for no bytes.
  if (loops.run_bytes == 0) loops.sizes[0] = 0;
  return loops;
}

}  // namespace paged
