// Products of a few query rows with rows of keys and values as they are stored, by vectors.
#pragma once

#include "attention_rows.h"
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

// What was summed before, relative to the rows' maxima of now.
static inline void correct(const Rows& rows, int64_t count, int64_t width, float* accumulated) {
  for (int64_t r = 0; r < count; ++r) {
    if (rows.correction[r] == 1) continue;
    for (int64_t d = 0; d < width; d += kLanes)
      store(accumulated + r * width + d, load(accumulated + r * width + d) * rows.correction[r]);
  }
}

// Adds the weighted values of a tile. A value that a row does not see is not multiplied by its weight of 0, as it may
// be NaN: keys that all rows see are taken together, the others row by row.
template <class Sum, class Stored>
void accumulate(const Rows& rows, int64_t count, float* weights, const Stored* const* values, int64_t first_key,
                int64_t keys, int64_t size, float* accumulated, NextRows<Stored> next) {
  const int64_t width = padded(size);
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

// What `decode` multiplies with.
template <class Dot, class Sum>
struct VectorProducts {
  using Query = typename Dot::Packed;

  // Row r of `count`.
  template <class Stored>
  static void pack_query(const Stored* row, int64_t r, int64_t count, int64_t head_dim, Query* query) {
    const int64_t chunked_size = (head_dim + kChunk - 1) / kChunk * kChunk;
    with_rows(count, [&](auto n) {
      constexpr int share = share_of(n);
      for (int64_t d = 0; d < chunked_size; d += kChunk / share)
        Dot::pack(query + r * 2 * padded(head_dim) + share * d, Dot::template load_parts<share>(row + d, row + d));
    });
  }

  template <class Stored>
  static void score(const AttentionCall& call, const Query* query, int64_t count, const Stored* const* key_rows,
                    int64_t keys, float* scores, NextRows<Stored> next) {
    const int64_t chunked_size = (call.head_dim + kChunk - 1) / kChunk * kChunk;
    with_rows(count, [&](auto n) {
      with_length<Stored>(chunked_size, [&](auto is_long) {
        score_keys<n, is_long, Dot>(query, 2 * padded(call.head_dim), key_rows, keys, chunked_size, scores, next);
      });
    });
  }

  template <class Stored>
  static void add(const AttentionCall& call, const Rows& rows, int64_t count, float* weights,
                  const Stored* const* value_rows, int64_t first_key, int64_t keys, float* accumulated,
                  NextRows<Stored> next) {
    correct(rows, count, padded(call.v_head_dim), accumulated);
    accumulate<Sum>(rows, count, weights, value_rows, first_key, keys, call.v_head_dim, accumulated, next);
  }
};

}  // namespace
}  // namespace paged::PAGED_ISA
