// Attention scores and their online softmax, in base 2; FlashAttention-2, arXiv 2307.08691, section 3.1.
#pragma once
#include <cmath>

#include "attention_schedule.cuh"
#include "ptx.cuh"

namespace paged::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// From a dot product to a score in units of log2.
struct ScoreRules {
  float scale;                // on the dot product, log2(e) included
  float softcap_argument;     // scale / softcap * 2 log2(e), or 0
  float softcap;              // softcap * log2(e)
  const float* alibi_slopes;  // of the KV head's group, or null

  __device__ ScoreRules(const AttentionCall& call, int kv_head) {
    const float natural = float(call.scale) * stored_scale(call.key_scale, kv_head);
    const float cap = float(call.softcap);
    scale = natural * kLog2E;
    softcap_argument = cap > 0 ? natural / cap * (2 * kLog2E) : 0.0f;
    softcap = cap * kLog2E;
    alibi_slopes = call.alibi_slopes ? call.alibi_slopes + kv_head * (call.num_heads / call.num_kv_heads) : nullptr;
  }

  // tanh(x) = 1 - 2 / (1 + e^2x), within 1e-7.
  __device__ __forceinline__ float capped(float dot) const {
    return softcap * (1.0f - __fdividef(2.0f, 1.0f + ptx::exp2_approx(dot * softcap_argument)));
  }
};

// What one row of scores needs to know of its query; made anew where it is needed, as registers are scarce.
class RowRules {
 public:
  __device__ __forceinline__ RowRules(const AttentionCall& call, const ScoreRules& rules, const QueryTile& tile,
                                      int keys_end, int row)
      : position_(position_of(tile, row)) {
    const bool is_there = row < tile.num_rows;
    const KeyRange seen = is_there ? visible_keys(call, position_, tile.seq_len) : KeyRange{0, 0};
    key_begin_ = int(seen.begin);
    key_end_ = seen.end < keys_end ? int(seen.end) : keys_end;
    alibi_slope_ =
        rules.alibi_slopes && is_there ? rules.alibi_slopes[(tile.first_row + row) % tile.group] * kLog2E : 0.0f;
  }

  // Adds the ALiBi bias, and hides the key where the row does not see it.
  __device__ __forceinline__ float finish(float score, int key) const {
    const float biased = score + alibi_slope_ * float(key - position_);
    return key >= key_begin_ && key < key_end_ ? biased : -INFINITY;
  }

 private:
  int position_, key_begin_, key_end_;
  float alibi_slope_;  // times log2(e)
};

// The running maximum and sum of one row.
struct RowState {
  float maximum = -INFINITY;
  float sum = 0.0f;

  // Takes in a new maximum and returns the factor on what was summed before.
  __device__ __forceinline__ float rescale(float new_maximum) {
    const float factor = ptx::exp2_approx(maximum - finite(new_maximum));
    maximum = new_maximum;
    sum *= factor;
    return factor;
  }

  // A row that has seen nothing compares with 0, as -inf - -inf is NaN.
  static __device__ __forceinline__ float finite(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  __device__ __forceinline__ float weight(float score) {
    const float result = ptx::exp2_approx(score - finite(maximum));
    sum += result;
    return result;
  }

  // A sum of 0 is a row that has seen nothing; NaN, of a score or of infinite ones, comes out as NaN.
  __device__ __forceinline__ float lse2() const { return sum == 0 ? -INFINITY : maximum + ptx::log2_approx(sum); }
};

// Whether some row of the tile of queries does not see all of a tile of keys.
struct MaskBounds {
  int begin, end;  // the keys that every row sees

  __device__ MaskBounds(const AttentionCall& call, const QueryTile& tile, KeyRange keys) {
    const KeyRange first = visible_keys(call, position_of(tile, 0), tile.seq_len);
    const KeyRange last = visible_keys(call, position_of(tile, tile.num_rows - 1), tile.seq_len);
    begin = int(last.begin);
    end = int(first.end < keys.end ? first.end : keys.end);
  }

  __device__ __forceinline__ bool cut(int key_begin, int count) const {
    return key_begin < begin || key_begin + count > end;
  }
};

// A sink is one more logit without a value (arXiv 2508.10925): with it, a row's weights shrink by the returned factor.
__device__ __forceinline__ float add_sink(const AttentionCall& call, int64_t head, float& lse2) {
  if (!call.sinks) return 1.0f;
  const float sink = call.sinks[head] * kLog2E;
  const float maximum = RowState::finite(fmaxf(sink, lse2));
  const float own = ptx::exp2_approx(lse2 - maximum);
  const float all = own + ptx::exp2_approx(sink - maximum);
  lse2 = all == 0 ? -INFINITY : maximum + ptx::log2_approx(all);
  return all == 0 ? 0.0f : own / all;
}

}  // namespace paged::cuda
