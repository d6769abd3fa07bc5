// Copies one block, in the preferred layout by one memcpy.
#include "../copy_blocks.h"

#include <cstring>

namespace paged::PAGED_ISA {

void copy_block(const BlockLoops& loops, const char* src, char* dst) {
  for (int64_t i = 0; i < loops.sizes[0]; ++i)
    for (int64_t j = 0; j < loops.sizes[1]; ++j)
      for (int64_t k = 0; k < loops.sizes[2]; ++k)
        std::memcpy(dst + i * loops.dst_strides[0] + j * loops.dst_strides[1] + k * loops.dst_strides[2],
                    src + i * loops.src_strides[0] + j * loops.src_strides[1] + k * loops.src_strides[2],
                    loops.run_bytes);
}

}  // namespace paged::PAGED_ISA
