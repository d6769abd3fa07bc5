// Copies one block, in the preferred layout in one run.
#include "../copy_blocks.h"

#include "streamed.h"

namespace paged::PAGED_ISA {

void copy_block(const BlockLoops& loops, const char* src, char* dst, bool streamed) {
  for (int64_t i = 0; i < loops.sizes[0]; ++i)
    for (int64_t j = 0; j < loops.sizes[1]; ++j)
      for (int64_t k = 0; k < loops.sizes[2]; ++k) {
        char* const to = dst + i * loops.dst_strides[0] + j * loops.dst_strides[1] + k * loops.dst_strides[2];
        const char* const from = src + i * loops.src_strides[0] + j * loops.src_strides[1] + k * loops.src_strides[2];
        if (streamed)
          copy_streamed(to, from, loops.run_bytes);
        else
          std::memcpy(to, from, loops.run_bytes);
      }
  if (streamed) end_streamed();
}

}  // namespace paged::PAGED_ISA
