// Attention of a few query rows that share a KV head, for neighbouring heads together, tile by tile.
#pragma once

#include "attention_rows.h"
#include "cached_rows.h"
#include "decode_products.h"

namespace paged::PAGED_ISA {
namespace {

// Turns by which fetching is ahead of using. 2 cores of an AMD EPYC, Zen 4, random blocks of 16, 32/8x128, 8 sequences
// of 2,048 tokens: 1 turn bfloat16 19.5 GB/s, float32 21.2; 2 turns 25.0 and 24.7; 4 turns 22.2 and 24.4; a bare read
// 25.6 and 29.0. Short rows lose by it: 14/2x64, 16 sequences, bfloat16 17.6 and 16.7, float32 18.6 and 20.2.
constexpr int kMostAhead = 2;

// Pointers to the rows of a tile.
template <class T>
struct TileRows {
  int64_t keys;
  const T *key[kTileKeys], *value[kTileKeys];
};

template <class T>
const float* pack_row(const T* row, int64_t size, int64_t stride, float* packed) {
  for (int64_t d = 0; d < size; d += kChunk) store_chunk(packed + d, gather_chunk(row, d, size, stride));
  return packed;
}

template <class T>
void pack_rows(const T* const* rows, int64_t count, int64_t size, int64_t stride, float* packed,
               const float** packed_rows) {
  const int64_t width = padded(size);
  for (int64_t i = 0; i < count; ++i) packed_rows[i] = pack_row(rows[i], size, stride, packed + i * width);
}

// One piece of a gang, and what it keeps from tile to tile.
template <class Query>
struct Member {
  float* accumulated;
  Query* query;
  Scoring how;
  Rows rows;
};

// `Stored` is T where rows are read in place, float where they are packed first.
//
// The pieces of a gang take turns at each tile: a block holds its heads one after the other, so that it is read in one
// go, wherever the next one lies. 2 cores of a 4th generation Xeon, random blocks of 16, bfloat16, GB/s with one piece
// after the other and with gangs: 32/8x128, 8 sequences of 2,048 tokens 22.9 and 24.0 (float32 24.5 and 26.3), one of
// 32,768 19.0 and 22.1, blocks of 128 there 25.1.
template <class T, class Stored, class Products, bool in_place>
void decode(const AttentionCall& call, const AttentionWork* gang, int64_t size, const AttentionWork* end,
            float* scratch, float* partials) {
  using Query = typename Products::Query;
  const int64_t count = rows_of(*gang), key_width = padded(call.head_dim), value_width = padded(call.v_head_dim);
  float* const packed_keys = scratch;
  float* const packed_values = packed_keys + kTileKeys * key_width;
  scratch = packed_values + kTileKeys * value_width;
  Member<Query> members[kGang];
  for (int64_t m = 0; m < size; ++m) {
    Member<Query>& member = members[m];
    member.accumulated = scratch;
    std::memset(member.accumulated, 0, count * value_width * sizeof(float));
    scratch += count * value_width;
    member.query = reinterpret_cast<Query*>(scratch);
    scratch += count * 2 * key_width;
    for (int64_t r = 0; r < count; ++r) {
      const Stored* row;
      if constexpr (in_place)
        row = query_row<T>(call, gang[m], r);
      else
        row = pack_row(query_row<T>(call, gang[m], r), call.head_dim, 1, packed_keys);
      Products::pack_query(row, r, count, call.head_dim, member.query);
    }
    begin_rows(call, gang[m], 0, count, period_of(int(count)), member.rows);
    member.how = scoring(call, gang[m]);
  }

  alignas(64) float scores[kTileKeys * kDecodeRows];
  TileRows<T> cached[kMostAhead + 1];
  TileRows<Stored> packed;
  const int ahead = is_long<T>(call.head_dim) ? kMostAhead : 1;
  const AttentionWork* const following = gang + size;
  // Looks tiles up in the order in which they are used, the first ones of the gang that follows at the end.
  int64_t next_first = gang->key_begin, next_piece = 0;
  const auto find_next = [&](TileRows<T>& tile) {
    const bool own = next_first < gang->key_end;
    const AttentionWork* const piece = own ? gang + next_piece : following + next_piece;
    tile.keys = 0;
    if (piece < end && (own || piece == following || differs_in_heads_alone(*following, *piece))) {
      const int64_t first = own ? next_first : piece->key_begin;
      tile.keys = min(kTileKeys, piece->key_end - first);
      find_rows(call, *piece, call.key_cache, call.key, first, tile.keys, tile.key);
      find_rows(call, *piece, call.value_cache, call.value, first, tile.keys, tile.value);
    }
    if (++next_piece == size && own) next_piece = 0, next_first += kTileKeys;
  };
  for (int i = 0; i < ahead; ++i) find_next(cached[i]);
  int current = 0, farthest = ahead;
  for (int64_t first = gang->key_begin; first < gang->key_end; first += kTileKeys) {
    for (int64_t m = 0; m < size; ++m) {
      Member<Query>& member = members[m];
      const TileRows<T>& tile = cached[current];
      TileRows<T>& next = cached[farthest];
      find_next(next);
      current = current == ahead ? 0 : current + 1;
      farthest = farthest == ahead ? 0 : farthest + 1;
      const int64_t keys = tile.keys;
      const Stored* const* key_rows;
      const Stored* const* value_rows;
      if constexpr (in_place) {
        key_rows = tile.key;
        value_rows = tile.value;
      } else {
        pack_rows(tile.key, keys, call.head_dim, call.key.dim, packed_keys, packed.key);
        pack_rows(tile.value, keys, call.v_head_dim, 1, packed_values, packed.value);
        key_rows = packed.key;
        value_rows = packed.value;
      }
      NextRows<Stored> next_key_rows, next_value_rows;
      if constexpr (in_place) {
        next_key_rows = {next.key, next.keys, call.head_dim};
        next_value_rows = {next.value, next.keys, call.v_head_dim};
      }
      Products::score(call, member.query, count, key_rows, keys, scores, next_key_rows);
      online_softmax(member.rows, member.how, scores, first, keys);
      Products::add(call, member.rows, count, scores, value_rows, first, keys, member.accumulated, next_value_rows);
    }
  }
  for (int64_t m = 0; m < size; ++m)
    end_rows<T>(call, gang[m], 0, count, members[m].rows, members[m].accumulated, partials);
}

}  // namespace
}  // namespace paged::PAGED_ISA
