// Attention of a few query rows that share a KV head: each byte of K and V is read once, in place, for all of them.
#include "decode_gang.h"

namespace paged::PAGED_ISA {
namespace {

template <class T, class Dot, class Sum>
void decode(const AttentionCall& call, const AttentionWork* gang, int64_t size, const AttentionWork* end,
            float* scratch, float* partials) {
  const bool in_place = call.key.dim == 1 && call.head_dim % kChunk == 0 && call.v_head_dim % kChunk == 0;
  if (in_place)
    decode<T, T, VectorProducts<Dot, Sum>, true>(call, gang, size, end, scratch, partials);
  else
    decode<T, float, VectorProducts<FloatDot<float>, FloatSum<float>>, false>(call, gang, size, end, scratch, partials);
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
