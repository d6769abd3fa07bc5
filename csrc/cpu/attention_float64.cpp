// Attention in float64, one row at a time: for exact comparisons, not for speed.
#include "attention_float64.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace paged {
namespace {

double score(const AttentionCall& call, double dot, int64_t head, int64_t kv_head, int64_t distance) {
  double x = dot * call.scale * stored_scale(call.key_scale, kv_head);
  if (call.softcap > 0) x = call.softcap * std::tanh(x / call.softcap);
  return call.alibi_slopes ? x + double(call.alibi_slopes[head]) * distance : x;
}

void attend_row(const AttentionCall& call, int64_t token, int64_t head, int64_t seq, std::vector<double>& weights) {
  const int64_t seq_len = call.seq_lens[seq];
  const int64_t position = seq_len - call.cu_seqlens_q[seq + 1] + token;
  const KeyRange keys = visible_keys(call, position, seq_len);
  const int64_t kv_head = head / (call.num_heads / call.num_kv_heads);
  const int32_t* blocks = call.block_table + seq * call.table_stride;
  const auto row = [&](const void* cache, const CacheStrides& strides, int64_t j) {
    return static_cast<const double*>(cache) + int64_t(blocks[j / call.block_size]) * strides.block +
           j % call.block_size * strides.token + kv_head * strides.head;
  };
  const double* query =
      static_cast<const double*>(call.query) + token * call.query_token_stride + head * call.query_head_stride;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double sink = call.sinks ? double(call.sinks[head]) : -infinity;

  double largest = sink;
  weights.resize(keys.end - keys.begin);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const double* key = row(call.key_cache, call.key, j);
    double dot = 0;
    for (int64_t d = 0; d < call.head_dim; ++d) dot += query[d] * key[d * call.key.dim];
    const double x = score(call, dot, head, kv_head, j - position);
    weights[j - keys.begin] = x;
    largest = std::max(largest, x);
  }
  double sum = call.sinks ? std::exp(sink - largest) : 0;
  for (double& weight : weights) sum += weight = std::exp(weight - largest);

  double out[512] = {};
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const double* value = row(call.value_cache, call.value, j);
    for (int64_t d = 0; d < call.v_head_dim; ++d) out[d] += weights[j - keys.begin] * value[d];
  }
  double* to = static_cast<double*>(call.out) + (token * call.num_heads + head) * call.v_head_dim;
  const double factor = sum == 0 ? 0 : stored_scale(call.value_scale, kv_head) / sum;
  for (int64_t d = 0; d < call.v_head_dim; ++d) to[d] = out[d] * factor;
  if (call.lse) call.lse[head * call.num_tokens + token] = sum == 0 ? -infinity : float(largest + std::log(sum));
}

}  // namespace

void attention_float64(const AttentionCall& call, int64_t begin, int64_t end) {
  std::vector<double> weights;
  int64_t seq = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / call.num_heads;
    while (token >= call.cu_seqlens_q[seq + 1]) ++seq;
    attend_row(call, token, row % call.num_heads, seq, weights);
  }
}

}  // namespace paged
