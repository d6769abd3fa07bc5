// What an attention kernel gets beside the call itself: how rows and keys are divided over its thread blocks.
#pragma once
#include <cstdint>

#include "../attention_call.h"

namespace paged::cuda {

// Tokens that a deterministic split has at least, and how many splits a sequence has at most.
constexpr int kDeterministicSplit = 512;
constexpr int kMaxDeterministicSplits = 32;

struct AttentionParams {
  AttentionCall call;
  // The packed query rows (heads of a group times queries) of the sequences that this launch works on.
  int64_t min_rows, max_rows;
  bool one_tile_a_sequence;  // then tile i is sequence i, else tiles are counted over the sequences
  bool deterministic;        // a sequence's splits depend on its own length alone
  int log2_block_size;
  int num_splits;      // grid; 1: the kernel writes the output itself
  int tile_rows;       // that a tile of this launch has at most
  float* partial_out;  // [num_splits, tiles, num_kv_heads, tile_rows, v_head_dim]
  float* partial_lse;  // [num_splits, tiles, num_kv_heads, tile_rows], base 2
  bool query_in_16_bytes, key_in_16_bytes, value_in_16_bytes;  // rows begin at 16-byte boundaries
};

}  // namespace paged::cuda
