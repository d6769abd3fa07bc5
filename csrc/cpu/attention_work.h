// A piece of work of one attention call: some query rows of one KV head against a range of keys.
#pragma once

#include <cstdint>

#include "../attention_call.h"

namespace paged {

// Query row r of a piece is head `head_begin + r % head_count` of query `query_begin + r / head_count`.
struct AttentionWork {
  int64_t seq, kv_head;
  int64_t head_begin, head_count;    // query heads, all of `kv_head`'s group
  int64_t query_begin, query_count;  // queries, counted within the sequence
  int64_t key_begin, key_end;
  int64_t partial;  // where the piece's partial result begins, in floats; -1: the piece writes the output itself
};

constexpr int64_t kDecodeRows = 8;  // up to this many rows read K and V in place
constexpr int64_t kGang = 8;        // pieces of neighbouring heads that go through the same blocks together
// Rows that share one packed tile of K and V. 2 cores of a 4th generation Xeon, prefill of 2,048 tokens, 32/8x128,
// GFLOP/s with 64 and 128 rows: bfloat16 248 and 261, float32 220 and 236; of 512 tokens 226 and 246, 217 and 229.
constexpr int64_t kPrefillRows = 128;
constexpr int64_t kTileKeys = 64;  // keys between two updates of the softmax
constexpr int64_t kPadding = 32;   // floats; packed rows are zero-padded to a multiple, two vectors of any machine

static inline int64_t padded(int64_t size) { return (size + kPadding - 1) / kPadding * kPadding; }

static inline int64_t rows_of(const AttentionWork& work) { return work.query_count * work.head_count; }

static inline bool differs_in_heads_alone(const AttentionWork& a, const AttentionWork& b) {
  return a.seq == b.seq && a.head_count == b.head_count && a.query_begin == b.query_begin &&
         a.query_count == b.query_count && a.key_begin == b.key_begin && a.key_end == b.key_end;
}

// A partial result: per row an unnormalised output [padded(v_head_dim)], then all rows' maxima, then all rows' sums.
static inline int64_t partial_floats(int64_t rows, int64_t v_head_dim) { return rows * (padded(v_head_dim) + 2); }

// What kernels need for themselves: packed query, K, V, scores (twice) and output. The queries of a gang take twice
// their width.
static_assert(2 * kGang * kDecodeRows <= kPrefillRows);
static inline int64_t scratch_floats(const AttentionCall& call) {
  const int64_t k = padded(call.head_dim), v = padded(call.v_head_dim);
  return kPrefillRows * (k + v + 2 * kTileKeys) + kTileKeys * (k + v);
}

// What a core reads in the time of one multiplication and addition: 15 GB/s and 50e9 a second, 750e9 with AMX.
constexpr double kBytesPerMultiplyAdd = 0.3, kTileBytesPerMultiplyAdd = 0.02;

// With AMX more rows share a tile, as its values are turned for all of them, and more keys lie between two updates.
constexpr int64_t kTilePrefillRows = 1024, kWeighedKeys = 128;
// Packed query, K, V, scores, weights and output, and the output of a panel of 32 rows as it is written.
static inline int64_t amx_scratch_floats(const AttentionCall& call) {
  const int64_t k = padded(call.head_dim), v = padded(call.v_head_dim), decode = scratch_floats(call);
  const int64_t prefill = kTilePrefillRows * (k / 2 + v) + kWeighedKeys * (k + v + 96) / 2 + 32 * v;
  return prefill > decode ? prefill : decode;
}

// Pieces that differ in their heads alone, up to kGang of them, are worked on together, tile by tile. What the same
// thread works on next lies behind them, up to `end`: its first keys can be fetched from memory meanwhile.
using AttendGang = void (*)(const AttentionCall& call, const AttentionWork* gang, int64_t count,
                            const AttentionWork* end, float* scratch, float* partials);
using AttendPiece = void (*)(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials);
using MergePieces = void (*)(const AttentionCall& call, const AttentionWork* pieces, int64_t count, float* partials);

// The kernels for one storage type on one instruction set.
struct AttentionKernels {
  AttendGang decode;    // at most kDecodeRows rows
  AttendPiece prefill;  // at most prefill_rows
  MergePieces merge;    // the pieces of the same rows, in the order of their keys
  int64_t prefill_rows;
  int64_t (*scratch_floats)(const AttentionCall& call);  // for decode and prefill
  double bytes_per_multiply_add;                         // of prefill
};

}  // namespace paged
