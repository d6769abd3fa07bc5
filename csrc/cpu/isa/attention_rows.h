// The online softmax over a tile of scores, for rows that lie side by side in vector lanes.
#pragma once

#include "../attention_work.h"
#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// A tile of scores is laid out [keys][period]: with fewer rows than lanes one vector holds several keys, and row r
// lives in every lane that is r modulo the period. Maxima and sums are in units of log2.
struct Rows {
  int period;
  float maximum[kChunk], sum[kChunk], correction[kChunk];  // one entry a lane; sums are partial until `row_sum`
  float slope[kChunk];
  int32_t position[kChunk], begin[kChunk], end[kChunk];  // of the query; of the keys it sees
  int32_t some_begin, some_end;                          // keys that at least one row sees
  int32_t every_begin, every_end;                        // keys that every row sees
};

struct Scoring {
  float scale, softcap;
  bool has_softcap, has_slopes;
};

PAGED_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PAGED_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

PAGED_INLINE int64_t head_of(const AttentionWork& work, int64_t row) { return work.head_begin + row % work.head_count; }
PAGED_INLINE int64_t token_of(const AttentionCall& call, const AttentionWork& work, int64_t row) {
  return call.cu_seqlens_q[work.seq] + work.query_begin + row / work.head_count;
}

template <class T>
PAGED_INLINE const T* query_row(const AttentionCall& call, const AttentionWork& work, int64_t row) {
  return static_cast<const T*>(call.query) + token_of(call, work, row) * call.query_token_stride +
         head_of(work, row) * call.query_head_stride;
}

PAGED_INLINE Scoring scoring(const AttentionCall& call, const AttentionWork& work) {
  const float scale = float(call.scale) * stored_scale(call.key_scale, work.kv_head);
  const bool capped = call.softcap > 0;
  return {capped ? scale / float(call.softcap) : scale * kLog2e, float(call.softcap) * kLog2e, capped,
          call.alibi_slopes != nullptr};
}

// Rows [first, first + count) of the piece; lanes past them repeat the last one and are never written out.
static inline void begin_rows(const AttentionCall& call, const AttentionWork& work, int64_t first, int64_t count,
                              int period, Rows& rows) {
  const int64_t seq_len = call.seq_lens[work.seq];
  const int64_t queries = call.cu_seqlens_q[work.seq + 1] - call.cu_seqlens_q[work.seq];
  rows.period = period;
  rows.some_begin = rows.every_end = INT32_MAX;
  rows.some_end = rows.every_begin = 0;
  for (int lane = 0; lane < (period > kLanes ? period : kLanes); ++lane) {
    const int64_t row = first + min(lane % period, count - 1);
    const int64_t position = seq_len - queries + work.query_begin + row / work.head_count;
    const KeyRange keys = visible_keys(call, position, seq_len);
    rows.maximum[lane] = -kInfinity;
    rows.sum[lane] = 0;
    rows.slope[lane] = call.alibi_slopes ? call.alibi_slopes[head_of(work, row)] * kLog2e : 0;
    rows.position[lane] = int32_t(position);
    rows.begin[lane] = int32_t(keys.begin);
    rows.end[lane] = int32_t(keys.end);
    if (keys.begin < keys.end) {
      rows.some_begin = int32_t(min(rows.some_begin, keys.begin));
      rows.some_end = int32_t(max(rows.some_end, keys.end));
    }
    rows.every_begin = int32_t(max(rows.every_begin, keys.begin));
    rows.every_end = int32_t(min(rows.every_end, keys.end));
  }
}

// The largest of the lanes that belong to the same row, in all of them.
PAGED_INLINE Vec row_maximum(Vec v, int period) {
  for (int shift = period; shift < kLanes; shift *= 2) {
    float twice[2 * kLanes];
    store(twice, v);
    store(twice + kLanes, v);
    v = max(v, load(twice + shift));
  }
  return v;
}

PAGED_INLINE float row_sum(const Rows& rows, int row) {
  float sum = 0;
  for (int lane = row; lane < (rows.period > kLanes ? rows.period : kLanes); lane += rows.period) sum += rows.sum[lane];
  return sum;
}

// Turns the scores of keys [first_key, first_key + count) into weights relative to the rows' maxima so far.
static inline void online_softmax(Rows& rows, const Scoring& how, float* scores, int64_t first_key, int64_t count) {
  const int period = rows.period;
  const int vectors = period > kLanes ? period / kLanes : 1;
  const int keys_per_vector = period < kLanes ? kLanes / period : 1;
  const int64_t step = int64_t(vectors) * kLanes;
  const int64_t steps = (count + keys_per_vector - 1) / keys_per_vector;
  const bool edge = first_key < rows.every_begin || first_key + count > rows.every_end || count % keys_per_vector != 0;

  for (int v = 0; v < vectors; ++v) {
    float* tile = scores + v * kLanes;
    const IntVec begin = load_as<IntVec>(rows.begin + v * kLanes);
    IntVec end = load_as<IntVec>(rows.end + v * kLanes);
    const int32_t tile_end = int32_t(first_key + count);
    end = select(end < tile_end, end, splat(tile_end));
    const Vec slope = load(rows.slope + v * kLanes);
    const IntVec position = load_as<IntVec>(rows.position + v * kLanes);
    IntVec key = lane_numbers() / period + int32_t(first_key);
    Vec largest = splat(-kInfinity);

    if (!edge && !how.has_softcap && !how.has_slopes) {
      for (int64_t i = 0; i < steps; ++i) {
        const Vec x = load(tile + i * step) * how.scale;
        store(tile + i * step, x);
        largest = max(largest, x);
      }
    } else {
      for (int64_t i = 0; i < steps; ++i, key += keys_per_vector) {
        Vec x = load(tile + i * step) * how.scale;
        if (how.has_softcap) x = tanh(x) * how.softcap;
        if (how.has_slopes) x += slope * __builtin_convertvector(key - position, Vec);
        if (edge) x = select((key >= begin) & (key < end), x, splat(-kInfinity));
        store(tile + i * step, x);
        largest = max(largest, x);
      }
    }

    const Vec before = load(rows.maximum + v * kLanes);
    const Vec after = max(before, row_maximum(largest, period));
    const Vec reference = select(after == -kInfinity, Vec{}, after);
    const Vec correction = exp2_nonpositive(before - reference);
    Vec sum = load(rows.sum + v * kLanes) * correction;
    for (int64_t i = 0; i < steps; ++i) {
      const Vec weight = exp2_nonpositive(load(tile + i * step) - reference);
      store(tile + i * step, weight);
      sum += weight;
    }
    store(rows.maximum + v * kLanes, after);
    store(rows.correction + v * kLanes, correction);
    store(rows.sum + v * kLanes, sum);
  }
}

// Normalises one row and writes its output and log-sum-exp; `accumulated` is in chunks.
template <class T>
void write_row(const AttentionCall& call, const AttentionWork& work, int64_t row, const float* accumulated,
               float maximum, float sum) {
  const int64_t head = head_of(work, row), token = token_of(call, work, row);
  float weight = 1;
  if (call.sinks) {
    const float sink = call.sinks[head] * kLog2e;
    const float largest = sink > maximum ? sink : maximum;
    weight = __builtin_exp2f(maximum - largest);
    sum = sum * weight + __builtin_exp2f(sink - largest);
    maximum = largest;
  }
  const float factor = sum == 0 ? 0 : weight * stored_scale(call.value_scale, work.kv_head) / sum;
  T* to = static_cast<T*>(call.out) + (token * call.num_heads + head) * call.v_head_dim;
  for (int64_t d = 0; d < call.v_head_dim; d += kChunk) {
    const Chunk c = load_chunk(accumulated + d);
    store_chunk(to + d, Chunk{c.first * factor, c.second * factor}, call.v_head_dim - d);
  }
  if (call.lse)
    call.lse[head * call.num_tokens + token] = sum == 0 ? -kInfinity : (maximum + __builtin_log2f(sum)) * kLn2;
}

// Writes the finished rows: to the output, or as a partial result to be merged.
template <class T>
void end_rows(const AttentionCall& call, const AttentionWork& work, int64_t first, int64_t count, const Rows& rows,
              const float* accumulated, float* partials) {
  const int64_t width = padded(call.v_head_dim);
  for (int64_t r = 0; r < count; ++r) {
    const float sum = row_sum(rows, int(r));
    if (work.partial < 0) {
      write_row<T>(call, work, first + r, accumulated + r * width, rows.maximum[r], sum);
      continue;
    }
    float* partial = partials + work.partial;
    std::memcpy(partial + (first + r) * width, accumulated + r * width, width * sizeof(float));
    partial[rows_of(work) * width + first + r] = rows.maximum[r];
    partial[rows_of(work) * (width + 1) + first + r] = sum;
  }
}

}  // namespace
}  // namespace paged::PAGED_ISA
