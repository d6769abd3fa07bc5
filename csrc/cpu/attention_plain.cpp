// Attention one row at a time, without vectors or tiles, accumulating in float64.
#include "attention_plain.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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

template <class T>
void attend_row(const AttentionCall& call, int64_t token, int64_t head, int64_t seq, std::vector<double>& weights) {
  const int64_t seq_len = call.seq_lens[seq];
  const int64_t position = seq_len - call.cu_seqlens_q[seq + 1] + token;
  const KeyRange keys = visible_keys(call, position, seq_len);
  const int64_t kv_head = head / (call.num_heads / call.num_kv_heads);
  const int32_t* blocks = call.block_table + seq * call.table_stride;
  const auto row = [&](const void* cache, const CacheStrides& strides, int64_t j) {
    return static_cast<const T*>(cache) + int64_t(blocks[j / call.block_size]) * strides.block +
           j % call.block_size * strides.token + kv_head * strides.head;
  };
  const T* query = static_cast<const T*>(call.query) + token * call.query_token_stride + head * call.query_head_stride;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double sink = call.sinks ? double(call.sinks[head]) : -infinity;

  double largest = sink;
  weights.resize(keys.end - keys.begin);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const T* key = row(call.key_cache, call.key, j);
    double dot = 0;
    for (int64_t d = 0; d < call.head_dim; ++d) dot += double(query[d]) * double(key[d * call.key.dim]);
    const double x = score(call, dot, head, kv_head, j - position);
    weights[j - keys.begin] = x;
    largest = std::max(largest, x);
  }
  double sum = call.sinks ? std::exp(sink - largest) : 0;
  for (double& weight : weights) sum += weight = std::exp(weight - largest);

  double out[512] = {};
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const T* value = row(call.value_cache, call.value, j);
    for (int64_t d = 0; d < call.v_head_dim; ++d) out[d] += weights[j - keys.begin] * double(value[d]);
  }
  T* to = static_cast<T*>(call.out) + (token * call.num_heads + head) * call.v_head_dim;
  const double factor = sum > 0 ? stored_scale(call.value_scale, kv_head) / sum : 0;
  for (int64_t d = 0; d < call.v_head_dim; ++d) to[d] = T(out[d] * factor);
  if (call.lse) call.lse[head * call.num_tokens + token] = sum > 0 ? float(largest + std::log(sum)) : -infinity;
}

template <class T>
void attend_rows(const AttentionCall& call, int64_t begin, int64_t end) {
  std::vector<double> weights;
  int64_t seq = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / call.num_heads;
    while (token >= call.cu_seqlens_q[seq + 1]) ++seq;
    attend_row<T>(call, token, row % call.num_heads, seq, weights);
  }
}

}  // namespace

void attention_plain_float64(const AttentionCall& call, int64_t begin, int64_t end) {
  attend_rows<double>(call, begin, end);
}
void attention_plain_float32(const AttentionCall& call, int64_t begin, int64_t end) {
  attend_rows<float>(call, begin, end);
}
void attention_plain_bfloat16(const AttentionCall& call, int64_t begin, int64_t end) {
  attend_rows<torch::headeronly::BFloat16>(call, begin, end);
}
void attention_plain_float16(const AttentionCall& call, int64_t begin, int64_t end) {
  attend_rows<torch::headeronly::Half>(call, begin, end);
}

}  // namespace paged
