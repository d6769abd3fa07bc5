// Reading a cache's blocks into dense, padded rows.
#pragma once

#include "cache_rows.h"

namespace paged::cpu {

struct CacheRead {
  CacheView<const char> cache;
  char* rows;   // `[num_seqs, max_seq_len, num_kv_heads, head_dim]`, contiguous
  Scale scale;  // what is returned is the cache times it
  Element element;
  int64_t element_size;
  int64_t num_kv_heads, head_dim, block_size, max_seq_len;
};

// `[num_seqs]` lengths and a table of `[num_seqs, ..]` rows at `row_stride` elements.
struct SequenceTable {
  const int32_t* block_table;
  int64_t row_stride;
  const int32_t* seq_lens;
  int64_t num_seqs;
};

// Blocks [begin, end) of the call below, counted row by row of the result.
using LoadBlocks = void(const CacheRead& read, const SequenceTable& table, int64_t begin, int64_t end);

void gather_cache(const CacheRead& read, const SequenceTable& table);

}  // namespace paged::cpu
