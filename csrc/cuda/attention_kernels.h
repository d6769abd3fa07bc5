// The compiled attention kernels as the launcher sees them.
#pragma once
#include "../cache_calls.h"

namespace paged::cuda {

struct AttentionKernel {
  const void* function = nullptr;  // takes AttentionParams; grid: query tiles, KV heads, splits. Null: not compiled
  int rows = 0;                    // packed query rows of a tile
  int keys = 0;                    // of a tile, which splits are multiples of
  int threads = 0, shared_bytes = 0;
};

// Tensor-core kernels for 16-bit elements, `kDim` one of kTileDims, `rows` 16, 32, 64 or 128. Each pair of template
// arguments is compiled on its own.
template <typename T, int kDim>
AttentionKernel attention_tile_of(int rows);

// The float32 kernel for head dimensions up to `dim`, with tiles of up to `rows`.
AttentionKernel attention_fma_of(int dim, int rows);

struct MergeKernel {
  const void* function;  // takes AttentionParams and the tile's rows; grid: query tiles, KV heads, rows / rows_a_block
  int rows_a_block, threads;
};

MergeKernel attention_merge_of(Element type);

}  // namespace paged::cuda
