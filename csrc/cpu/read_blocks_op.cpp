// The torch face of read_blocks: unpacks tensors, checks them, calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "read_blocks.h"

namespace paged {
namespace {

int64_t read_blocks(const Tensor& cache, const Tensor& blocks) {
  const Arg cache_arg{cache, "cache"}, blocks_arg{blocks, "blocks"};
  check_dim(cache_arg, 2, "[num_blocks, block_bytes]");
  check_dtype(cache_arg, {ScalarType::Byte});
  check_contiguous(cache_arg);
  if (cache.size(1) % 64) reject(cache_arg, text("size ", cache.size(1), " in dimension 1"), "a multiple of 64");
  check_dim(blocks_arg, 1, "[count]");
  check_dtype(blocks_arg, {ScalarType::Long});
  check_same_device(blocks_arg, cache_arg);
  check_contiguous(blocks_arg);
  const int64_t* const ids = blocks.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < blocks.numel(); ++i)
    if (ids[i] < 0 || ids[i] >= cache.size(0))
      reject("blocks", text("value ", ids[i], " at [", i, "]"), text("in [0, ", cache.size(0), ") (num_blocks)"));
  return cpu::read_blocks(
      {reinterpret_cast<const char*>(cache.const_data_ptr<uint8_t>()), cache.size(1), ids, blocks.numel()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { m.impl("_read_blocks", TORCH_BOX(&read_blocks)); }

}  // namespace paged
