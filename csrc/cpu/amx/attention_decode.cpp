// Attention of a few query rows that share a KV head, in bfloat16: keys meet the queries as they lie in their blocks,
// values once two keys of them lie in a dword.
#include "../isa/decode_gang.h"
#include "tiles.h"
#include "weights_of_keys.h"

namespace paged::avx512 {

void attention_decode_bfloat16(const AttentionCall&, const AttentionWork*, int64_t, const AttentionWork*, float*,
                               float*);

}  // namespace paged::avx512

namespace paged::PAGED_ISA {
namespace {

// Which tile is what: scores of two groups of 16 keys, keys, a query; weights, values, two sums.
constexpr int kScores = 0, kMoreScores = 1, kKeys = 2, kQuery = 3, kWeights = 4, kValues = 5, kSum = 6, kSecondSum = 7;

TileShapes shapes_of(int64_t count) {
  const int64_t query_bytes = period_of(int(count)) * int64_t(sizeof(float));
  TileShapes shapes = whole_tiles();
  for (const int tile : {kScores, kMoreScores, kQuery}) shapes.set(tile, kTileRows, query_bytes);
  for (const int tile : {kWeights, kSum, kSecondSum}) shapes.set(tile, count, kRowBytes);
  return shapes;
}

// What `decode` multiplies with.
struct TileProducts {
  using Query = uint32_t;  // [pair of elements][period]

  static void pack_query(const BFloat16* row, int64_t r, int64_t count, int64_t head_dim, uint32_t* query) {
    const int64_t period = period_of(int(count));
    if (r == 0) std::memset(query, 0, head_dim / 2 * period * sizeof(uint32_t));
    for (int64_t pair = 0; pair < head_dim / 2; ++pair)
      std::memcpy(query + pair * period + r, row + 2 * pair, sizeof(uint32_t));
  }

  // scores [key][period], also of what lies in a block behind its last key.
  static void score(const AttentionCall& call, const uint32_t* query, int64_t count, const BFloat16* const* key_rows,
                    int64_t keys, float* scores, NextRows<BFloat16> next) {
    const int64_t period = period_of(int(count)), query_bytes = period * int64_t(sizeof(float));
    const int64_t key_bytes = call.key.token * int64_t(sizeof(BFloat16));
    for (int64_t k = 0; k < keys; k += 2 * kTileRows) {
      const bool both = keys - k > kTileRows;
      clear_tile<kScores>();
      clear_tile<kMoreScores>();
      for (int64_t d = 0; d < call.head_dim; d += kTileElements) {
        load_tile<kQuery>(query + d / 2 * period, query_bytes);
        load_tile<kKeys>(key_rows[k] + d, key_bytes);
        multiply_tiles<kScores, kKeys, kQuery>();
        fetch(next);
        if (!both) continue;
        load_tile<kKeys>(key_rows[k + kTileRows] + d, key_bytes);
        multiply_tiles<kMoreScores, kKeys, kQuery>();
        fetch(next);
      }
      store_tile<kScores>(scores + k * period, query_bytes);
      if (both) store_tile<kMoreScores>(scores + (k + kTileRows) * period, query_bytes);
    }
  }

  static void add(const AttentionCall& call, const Rows& rows, int64_t count, float* weights,
                  const BFloat16* const* value_rows, int64_t first_key, int64_t keys, float* accumulated,
                  NextRows<BFloat16> next) {
    const int64_t size = call.v_head_dim;
    correct(rows, count, size, accumulated);
    if (first_key < rows.every_begin || first_key + keys > rows.every_end)
      return accumulate<FloatSum<BFloat16>>(rows, count, weights, value_rows, first_key, keys, size, accumulated, next);
    constexpr int64_t kGroups = kTileKeys / kTileElements;
    alignas(64) uint32_t weight_tiles[kGroups][kDecodeRows * kTileRows];
    alignas(64) uint32_t value_tiles[kGroups][2][kTileRows * kTileRows];
    const int64_t groups = (keys + kTileElements - 1) / kTileElements;
    const int period = period_of(int(count));
    for (int64_t g = 0; g < groups; ++g)
      pack_weights(weights + g * kTileElements * period, period, min(keys - g * kTileElements, kTileElements),
                   weight_tiles[g]);
    for (int64_t d = 0; d < size; d += kChunk) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * kTileElements;
        pack_values(value_rows + first, period, min(keys - first, kTileElements), d, value_tiles[g], next);
      }
      load_tile<kSum>(accumulated + d, size * sizeof(float));
      load_tile<kSecondSum>(accumulated + d + kLanes, size * sizeof(float));
      for (int64_t g = 0; g < groups; ++g) {
        load_tile<kWeights>(weight_tiles[g], kRowBytes);
        load_tile<kValues>(value_tiles[g][0], kRowBytes);
        multiply_tiles<kSum, kWeights, kValues>();
        load_tile<kValues>(value_tiles[g][1], kRowBytes);
        multiply_tiles<kSecondSum, kWeights, kValues>();
      }
      store_tile<kSum>(accumulated + d, size * sizeof(float));
      store_tile<kSecondSum>(accumulated + d + kLanes, size * sizeof(float));
    }
  }

 private:
  // As much as a tile of keys holds.
  PAGED_INLINE void fetch(NextRows<BFloat16>& next) {
    for (int i = 0; i < kTileRows; ++i) next.prefetch<kChunk>();
  }

  // Of 32 keys, elements [d, d + kChunk), the even, then the odd ones: a dword has those of keys k and k + 16, in the
  // row in which `pack_weights` has the weights of both. Zeros past `keys`.
  PAGED_INLINE void pack_values(const BFloat16* const* rows, int period, int64_t keys, int64_t d,
                                uint32_t (*tiles)[kTileRows * kTileRows], NextRows<BFloat16>& next) {
    for (int64_t k = 0; k < kTileRows; ++k) {
      const BitVec first = k < keys ? load_as<BitVec>(rows[k] + d) : BitVec{};
      const BitVec second = k + kTileRows < keys ? load_as<BitVec>(rows[k + kTileRows] + d) : BitVec{};
      next.prefetch<kChunk>();
      next.prefetch<kChunk>();
      const int64_t row = pair_of(k, period) * kTileRows;
      const Chunk pairs = pair_rows(first, second);
      store_as(tiles[0] + row, pairs.first);
      store_as(tiles[1] + row, pairs.second);
    }
  }
};

}  // namespace

void attention_decode_bfloat16(const AttentionCall& call, const AttentionWork* gang, int64_t size,
                               const AttentionWork* end, float* scratch, float* partials) {
  // Whole tiles of keys lie in a block. With fewer rows most of a tile of queries is empty. 2 cores of a Xeon with AMX,
  // random blocks of 16, GB/s by AVX-512 and by tiles: 32/8x128, 1 x 4,096, 8 x 2,048, 32 x 1,024, 1 x 32,768 tokens
  // 15.8 and 16.8, 18.9 and 19.1, 19.6 and 20.7, 19.7 and 21.2; 14/2x64, 16 x 2,048 12.8 and 14.4; but one row for each
  // of 16 KV heads of 64 24.1 and 22.3, two 18.3 and 18.4.
  constexpr int64_t kFewestRows = 3;
  const bool fits = rows_of(*gang) >= kFewestRows && call.block_size >= kTileRows && gang->key_begin % kTileRows == 0 &&
                    call.key.dim == 1 && call.head_dim % kTileElements == 0 && call.v_head_dim % kTileElements == 0;
  if (!fits) return avx512::attention_decode_bfloat16(call, gang, size, end, scratch, partials);
  const TileShapes shapes = shapes_of(rows_of(*gang));
  with_tiles(shapes, [&] { decode<BFloat16, BFloat16, TileProducts, true>(call, gang, size, end, scratch, partials); });
}

}  // namespace paged::PAGED_ISA
