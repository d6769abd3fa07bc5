// Reads blocks into dense, padded rows, and zeroes what lies past a sequence's end.
#pragma once
#include "row_types.cuh"

namespace paged::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherTokens = 16;  // of a thread block

struct GatherPair {
  CacheRead key, value;
};

// Pieces of the rows [first, last) of one sequence, as many lanes to a row as it has pieces.
template <typename Piece, typename T>
__device__ __forceinline__ void gather_rows(const CacheRead& read, const SequenceTable& table, int64_t sequence,
                                            int first, int last) {
  const int row_pieces = int(read.head_dim * sizeof(T) / sizeof(Piece));
  const int heads = int(read.num_kv_heads), block_size = int(read.block_size);
  const int seq_len = table.seq_lens[sequence];
  const int32_t* const blocks = table.block_table + sequence * table.row_stride;
  Piece* const rows =
      reinterpret_cast<Piece*>(read.rows) + (sequence * read.max_seq_len + first) * (int64_t(heads) * row_pieces);
#pragma unroll 4
  for (int index = threadIdx.x; index < (last - first) * heads * row_pieces; index += kGatherThreads) {
    const int piece = index % row_pieces, row = index / row_pieces;
    const int head = row % heads, token = first + row / heads;
    Piece stored{};
    if (token < seq_len) {
      const T* const from = reinterpret_cast<const T*>(read.cache.data) +
                            blocks[token / block_size] * read.cache.block_stride +
                            token % block_size * read.cache.token_stride + head * read.cache.head_stride;
      if constexpr (std::is_same_v<Piece, T>) {
        stored = from[piece * read.cache.dim_stride];
        if (const float* const factor = factor_of(read.scale, head)) stored = scaled<false>(stored, *factor);
      } else {
        stored = reinterpret_cast<const Piece*>(from)[piece];
      }
    }
    rows[index] = stored;
  }
}

// Whether all rows of the cache are made of pieces of 16 bytes.
template <typename T>
__device__ __forceinline__ bool has_pieces(const CacheRead& read) {
  const int64_t strides = read.cache.block_stride | read.cache.token_stride | read.cache.head_stride | read.head_dim;
  return read.scale.data == nullptr && read.cache.dim_stride == 1 && strides * sizeof(T) % sizeof(uint4) == 0 &&
         in_16_bytes(read.cache.data) && in_16_bytes(read.rows);
}

// Grid: `kGatherTokens` tokens of a sequence; key and value.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_cache_kernel(const __grid_constant__ GatherPair pair, const __grid_constant__ SequenceTable table) {
  const CacheRead& read = blockIdx.y == 0 ? pair.key : pair.value;
  const int64_t parts = (read.max_seq_len + kGatherTokens - 1) / kGatherTokens;
  const int64_t sequence = blockIdx.x / parts;
  const int first = int(blockIdx.x % parts) * kGatherTokens;
  const int last = int(first + kGatherTokens < read.max_seq_len ? first + kGatherTokens : read.max_seq_len);
  if (has_pieces<T>(read))
    gather_rows<uint4, T>(read, table, sequence, first, last);
  else
    gather_rows<T, T>(read, table, sequence, first, last);
}

}  // namespace paged::cuda
