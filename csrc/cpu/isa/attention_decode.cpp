// Attention of a few query rows that share a KV head: each byte of K and V is read once, in place, for all of them.
#include "attention_rows.h"
#include "cached_rows.h"
#include "dots.h"

namespace paged::PAGED_ISA {
namespace {

constexpr int period_of(int rows) { return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }

// Keys in a vector: the sums of a vector's halves take half the shuffles that the sums of whole vectors take, which is
// worth the loads in halves for many rows and wide vectors (4th generation Xeon, keys in the cache, bfloat16, 7 rows:
// 13.3 GB/s instead of 12.2, 4 rows 24.8 instead of 25.5; AVX2, 7 rows 6.6 instead of 7.1).
constexpr int share_of(int rows) { return kLanes == 16 && rows > 4 ? 2 : 1; }

// Rows of a tile to come, fetched while the same part of this tile is used: keys while keys are scored, values while
// values are added, so that memory is busy in every phase (2 cores of a 4th generation Xeon, random blocks of 16,
// bfloat16: 22.3 GB/s; the whole rows at once, one phase ahead: 20.7). Into the second-level cache, as the first
// level's fill buffers are too few (there into the first level: 8.5; Zen 4, one core: 14, into the first level 7).
// In the order of addresses, which the cache's own prefetcher follows: 27.2 GB/s of 28.8 with a query row per KV head,
// in the order in which the rows are used 26.2.
template <class Stored>
class NextRows {
 public:
  NextRows() = default;
  NextRows(const Stored* const* rows, int64_t count, int64_t size) : rows_(rows), count_(count), size_(size) {}

  // The next `size` elements.
  template <int size>
  PAGED_INLINED void prefetch() {
    constexpr int kLine = 64 / sizeof(Stored);
    if (row_ >= count_) return;
    if (size >= kLine || at_ % kLine == 0) {
#pragma GCC unroll 16
      for (int line = 0; line < size; line += kLine) __builtin_prefetch(rows_[row_] + at_ + line, 0, 2);
    }
    at_ += size;
    if (at_ >= size_) at_ = 0, ++row_;
  }

 private:
  const Stored* const* rows_ = nullptr;
  int64_t count_ = 0, size_ = 0, row_ = 0, at_ = 0;
};

// Rows of at least so many bytes are fetched from the second-level cache into the first some keys before they are used,
// as waiting for them in the middle of a tile holds up what is fetched from memory too. 2 cores of an AMD EPYC, Zen 4,
// random blocks of 16, GB/s without and with: 32/8x128, 8 sequences of 2,048 tokens, bfloat16 29.9 and 32.0, float32
// 28.8 and 30.6, one of 32,768 29.6 and 33.3, 28.5 and 29.9; 14/2x64 float32 26.6 and 28.5, but bfloat16, where rows
// have 128 bytes, would fall from 25.8 to 24.6.
constexpr int64_t kLongRow = 256;
constexpr int64_t kKeysAhead = 8, kValuesAhead = 16;

template <class Stored>
PAGED_INLINE bool is_long(int64_t size) {
  return size * int64_t(sizeof(Stored)) >= kLongRow;
}

// Calls `run` with that as a compile-time constant.
template <class Stored, class Run>
PAGED_INLINE void with_length(int64_t size, const Run& run) {
  if (is_long<Stored>(size))
    run(std::true_type{});
  else
    run(std::false_type{});
}

// The lines that begin in elements [d, d + size) of a row, or rather of one that begins with a line.
template <int size, class Stored>
PAGED_INLINE void fetch_near(const Stored* row, int64_t d) {
  constexpr int kLine = 64 / sizeof(Stored);
  if (size < kLine && d % kLine != 0) return;
#pragma GCC unroll 16
  for (int i = 0; i < size; i += kLine) __builtin_prefetch(row + d + i, 0, 3);
}

// scores [count][period] = keys x query.
template <int rows, bool long_rows, class Dot, class Stored>
void score_keys(const typename Dot::Packed* query, int64_t query_stride, const Stored* const* keys, int64_t count,
                int64_t size, float* scores, NextRows<Stored> next) {
  constexpr int period = period_of(rows), share = share_of(rows);
  constexpr int together = share * kAccumulators / period;  // keys
  constexpr int step = kChunk / share;
  constexpr int64_t ahead = together > kKeysAhead ? together : kKeysAhead;
  // A vector of scores has its first half from the first keys of pairs, its second half from the others.
  constexpr int apart = share == 1 ? 0 : kLanes / period / 2;
  for (int64_t first = 0; first < count; first += together) {
    const Stored *key[together], *later[together];
#pragma GCC unroll 16
    for (int k = 0; k < together; ++k) {
      const int64_t i = first + k < count ? first + k : count - 1;
      key[k] = keys[i];
      if (long_rows) later[k] = keys[i + ahead < count ? i + ahead : count - 1];
    }
    Vec sum[kAccumulators] = {};
    for (int64_t d = 0; d < size; d += step) {
      if (long_rows && d % kChunk == 0) {
#pragma GCC unroll 16
        for (int k = 0; k < together; ++k) fetch_near<kChunk>(later[k], d);
      }
#pragma GCC unroll 16
      for (int v = 0; v < together / share; ++v) {
        const int k = share == 1 ? v : v / apart * 2 * apart + v % apart;
        const typename Dot::Part parts = Dot::template load_parts<share>(key[k] + d, key[k + apart] + d);
        next.template prefetch<kChunk>();
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
          sum[v * period + r] =
              Dot::multiply_add(sum[v * period + r], parts, Dot::load_packed(query + r * query_stride + share * d));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kAccumulators; v += kLanes / share)
      store(scores + first * period + v * share, sums<share>(sum + v));
  }
}

// accumulated [rows][width] += weights [count][period] x values, for `chunks` chunks of the values' rows from `d` on.
// Where a sum takes two rows at a time, these are `apart` keys apart, and the weights of both lie with the first.
template <int rows, int chunks, bool long_rows, class Sum, class Stored>
PAGED_INLINE void add_chunks(const float* weights, int period, const Stored* const* values, int64_t count, int64_t d,
                             float* accumulated, int64_t width, NextRows<Stored>& next) {
  constexpr int vectors = 2 * chunks;
  constexpr int64_t apart = kLanes / period_of(rows);
  constexpr int64_t ahead = Sum::kRows * apart > kValuesAhead ? Sum::kRows * apart : kValuesAhead;
  Vec sum[rows * vectors];
  unrolled<rows * vectors>(
      [&](auto i) PAGED_INLINED { sum[i] = load(accumulated + i / vectors * width + d + i % vectors * kLanes); });
  for (int64_t i = 0; i < count / Sum::kRows; ++i) {
    const int64_t k = Sum::kRows == 1 ? i : i / apart * 2 * apart + i % apart;
    const Stored *first = values[k] + d, *second = values[k + (Sum::kRows - 1) * apart] + d;
    unrolled<Sum::kRows>([&](auto row) PAGED_INLINED {
      next.template prefetch<chunks * kChunk>();
      const int64_t later = k + row * apart + ahead;
      if (long_rows) fetch_near<chunks * kChunk>(values[later < count ? later : count - 1], d);
    });
    unrolled<chunks>([&](auto c) PAGED_INLINED {
      const Chunk part = Sum::load_rows(first + c * kChunk, second + c * kChunk);
      unrolled<rows>([&](auto r) PAGED_INLINED {
        const auto weight = load_as<typename Sum::Weight>(weights + k * period + r);
        constexpr int at = r * vectors + 2 * c;
        sum[at] = Sum::multiply_add(sum[at], part.first, weight);
        sum[at + 1] = Sum::multiply_add(sum[at + 1], part.second, weight);
      });
    });
  }
  unrolled<rows * vectors>(
      [&](auto i) PAGED_INLINED { store(accumulated + i / vectors * width + d + i % vectors * kLanes, sum[i]); });
}

template <int rows, bool long_rows, class Sum, class Stored>
void add_values(const float* weights, int period, const Stored* const* values, int64_t count, int64_t size,
                float* accumulated, int64_t width, NextRows<Stored>& next) {
  constexpr int at_once = kAccumulators / 2;
  if constexpr (rows > at_once) {
    add_values<at_once, long_rows, Sum>(weights, period, values, count, size, accumulated, width, next);
    NextRows<Stored> nothing;
    add_values<rows - at_once, long_rows, Sum>(weights + at_once, period, values, count, size,
                                               accumulated + at_once * width, width, nothing);
  } else {
    constexpr int fitting = at_once / rows, chunks = fitting > 4 ? 4 : fitting;
    int64_t d = 0;
    for (; d + chunks * kChunk <= size; d += chunks * kChunk)
      add_chunks<rows, chunks, long_rows, Sum>(weights, period, values, count, d, accumulated, width, next);
    for (; d < size; d += kChunk)
      add_chunks<rows, 1, long_rows, Sum>(weights, period, values, count, d, accumulated, width, next);
  }
}

// Calls `run` with the number of rows as a compile-time constant.
template <class Run>
PAGED_INLINE void with_rows(int64_t rows, const Run& run) {
  switch (rows) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 5: return run(std::integral_constant<int, 5>{});
    case 6: return run(std::integral_constant<int, 6>{});
    case 7: return run(std::integral_constant<int, 7>{});
    default: return run(std::integral_constant<int, 8>{});
  }
}

// Puts the weights of two keys, rounded, where those of the first were.
PAGED_INLINE void pair_weights(float* weights, int64_t size) {
  for (int64_t i = 0; i < size; i += 2 * kLanes)
    store_as(weights + i, bfloat16_pairs(load(weights + i), load(weights + i + kLanes)));
}

// Adds the weighted values of a tile. A value that a row does not see is not multiplied by its weight of 0, as it may
// be NaN: keys that all rows see are taken together, the others row by row.
template <class Sum, class Stored>
void accumulate(const Rows& rows, int64_t count, float* weights, const Stored* const* values, int64_t first_key,
                int64_t keys, int64_t size, float* accumulated, NextRows<Stored> next) {
  const int64_t width = padded(size);
  for (int64_t r = 0; r < count; ++r) {
    if (rows.correction[r] == 1) continue;
    for (int64_t d = 0; d < width; d += kLanes)
      store(accumulated + r * width + d, load(accumulated + r * width + d) * rows.correction[r]);
  }
  const auto within = [&](int64_t key) { return min(max(key - first_key, 0), keys); };
  int64_t begin = within(rows.every_begin), end = within(rows.every_end);
  if (begin >= end) begin = end = keys;
  with_rows(count, [&](auto n) {
    constexpr int period = period_of(n), together = 2 * kLanes / period;
    const auto add = [&](auto sum, int64_t from, int64_t to) PAGED_INLINED {
      if (from >= to) return;
      with_length<Stored>(size, [&](auto is_long) {
        add_values<n, is_long, decltype(sum)>(weights + from * period, period, values + from, to - from, size,
                                              accumulated, width, next);
      });
    };
    int64_t some = begin, most = begin;
    if constexpr (Sum::kRows == 2) {
      some = min((begin + together - 1) / together * together, end);
      most = max(some, end / together * together);
      pair_weights(weights + some * period, (most - some) * period);
      add(Sum{}, some, most);
    }
    add(FloatSum<Stored>{}, begin, some);
    add(FloatSum<Stored>{}, most, end);
  });
  NextRows<Stored> nothing;
  const auto add_to_row = [&](int64_t r, int64_t from, int64_t to) {
    if (from < to)
      add_values<1, false, FloatSum<Stored>>(weights + from * rows.period + r, rows.period, values + from, to - from,
                                             size, accumulated + r * width, width, nothing);
  };
  for (int64_t r = 0; r < count; ++r) {
    add_to_row(r, within(rows.begin[r]), min(within(rows.end[r]), begin));
    add_to_row(r, max(within(rows.begin[r]), end), within(rows.end[r]));
  }
}

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
template <class Dot>
struct Member {
  float* accumulated;
  typename Dot::Packed* query;
  Scoring how;
  Rows rows;
};

// `Stored` is T where rows are read in place, float where they are packed first.
//
// The pieces of a gang take turns at each tile: a block holds its heads one after the other, so that it is read in one
// go, wherever the next one lies. 2 cores of a 4th generation Xeon, random blocks of 16, bfloat16, GB/s with one piece
// after the other and with gangs: 32/8x128, 8 sequences of 2,048 tokens 22.9 and 24.0 (float32 24.5 and 26.3), one of
// 32,768 19.0 and 22.1, blocks of 128 there 25.1.
template <class T, class Stored, class Dot, class Sum, bool in_place>
void decode(const AttentionCall& call, const AttentionWork* gang, int64_t size, const AttentionWork* end,
            float* scratch, float* partials) {
  const int64_t count = rows_of(*gang), key_width = padded(call.head_dim), value_width = padded(call.v_head_dim);
  const int64_t chunked_size = (call.head_dim + kChunk - 1) / kChunk * kChunk;
  float* const packed_keys = scratch;
  float* const packed_values = packed_keys + kTileKeys * key_width;
  scratch = packed_values + kTileKeys * value_width;
  Member<Dot> members[kGang];
  for (int64_t m = 0; m < size; ++m) {
    Member<Dot>& member = members[m];
    member.accumulated = scratch;
    std::memset(member.accumulated, 0, count * value_width * sizeof(float));
    scratch += count * value_width;
    member.query = reinterpret_cast<typename Dot::Packed*>(scratch);
    scratch += count * 2 * key_width;
    for (int64_t r = 0; r < count; ++r) {
      const Stored* row;
      if constexpr (in_place)
        row = query_row<T>(call, gang[m], r);
      else
        row = pack_row(query_row<T>(call, gang[m], r), call.head_dim, 1, packed_keys);
      with_rows(count, [&](auto n) {
        constexpr int share = share_of(n);
        for (int64_t d = 0; d < chunked_size; d += kChunk / share)
          Dot::pack(member.query + r * 2 * key_width + share * d, Dot::template load_parts<share>(row + d, row + d));
      });
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
      Member<Dot>& member = members[m];
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
      with_rows(count, [&](auto n) {
        with_length<Stored>(chunked_size, [&](auto is_long) {
          score_keys<n, is_long, Dot>(member.query, 2 * key_width, key_rows, keys, chunked_size, scores, next_key_rows);
        });
      });
      online_softmax(member.rows, member.how, scores, first, keys);
      accumulate<Sum>(member.rows, count, scores, value_rows, first, keys, call.v_head_dim, member.accumulated,
                      next_value_rows);
    }
  }
  for (int64_t m = 0; m < size; ++m)
    end_rows<T>(call, gang[m], 0, count, members[m].rows, members[m].accumulated, partials);
}

template <class T, class Dot, class Sum>
void decode(const AttentionCall& call, const AttentionWork* gang, int64_t size, const AttentionWork* end,
            float* scratch, float* partials) {
  const bool in_place = call.key.dim == 1 && call.head_dim % kChunk == 0 && call.v_head_dim % kChunk == 0;
  if (in_place)
    decode<T, T, Dot, Sum, true>(call, gang, size, end, scratch, partials);
  else
    decode<T, float, FloatDot<float>, FloatSum<float>, false>(call, gang, size, end, scratch, partials);
}

}  // namespace

void attention_decode_float32(const AttentionCall& call, const AttentionWork* gang, int64_t size,
                              const AttentionWork* end, float* scratch, float* partials) {
  decode<float, FloatDot<float>, FloatSum<float>>(call, gang, size, end, scratch, partials);
}
void attention_decode_bfloat16(const AttentionCall& call, const AttentionWork* gang, int64_t size,
                               const AttentionWork* end, float* scratch, float* partials) {
  decode<BFloat16, BFloat16Dot, BFloat16Sum>(call, gang, size, end, scratch, partials);
}
void attention_decode_float16(const AttentionCall& call, const AttentionWork* gang, int64_t size,
                              const AttentionWork* end, float* scratch, float* partials) {
  decode<Float16, FloatDot<Float16>, FloatSum<Float16>>(call, gang, size, end, scratch, partials);
}

}  // namespace paged::PAGED_ISA
