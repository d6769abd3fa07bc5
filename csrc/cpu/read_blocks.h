// Reading blocks and nothing else: what attention over them is measured against.
#pragma once

#include <cstdint>

namespace paged::cpu {

// `count` blocks of `block_bytes` each, in the order of their ids.
struct BlockRead {
  const char* cache;
  int64_t block_bytes;
  const int64_t* blocks;
  int64_t count;
};

// The bitwise exclusive or of the 4-byte words of all of them.
int32_t read_blocks(const BlockRead& read);

}  // namespace paged::cpu
