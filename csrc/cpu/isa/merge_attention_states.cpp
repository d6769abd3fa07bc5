// Weighs two attention outputs by exp(lse); a side with lse -inf saw no key and is not read.
#include "../merge_attention_states.h"

#include "row_types.h"

namespace paged::PAGED_ISA {
namespace {

template <class T>
const T* row_of(const AttentionState& state, int64_t token, int64_t head) {
  return reinterpret_cast<const T*>(state.out) + token * state.token_stride + head * state.head_stride;
}

float lse_of(const AttentionState& state, int64_t token, int64_t head) {
  return state.lse[head * state.lse_head_stride + token * state.lse_token_stride];
}

// out = weight_a * a + weight_b * b, where a weight of 0 keeps NaN out.
template <class T, class Weight>
void weigh(const T* a, Weight weight_a, const T* b, Weight weight_b, T* out, int64_t size) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t d = 0; d < size; ++d)
      out[d] = (weight_a != 0 ? weight_a * a[d] : 0) + (weight_b != 0 ? weight_b * b[d] : 0);
  } else {
    for (int64_t d = 0; d < size; d += kChunk) {
      Chunk sum = {};
      const auto add = [&](const T* from, float weight) {
        if (weight == 0) return;
        const Chunk c = load_chunk(from + d, size - d);
        sum.first += c.first * weight;
        sum.second += c.second * weight;
      };
      add(a, weight_a);
      add(b, weight_b);
      store_chunk(out + d, sum, size - d);
    }
  }
}

}  // namespace

void merge_states(const StateMerge& merge, int64_t begin, int64_t end) {
  with_type(merge.element, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (is_number<T>) {
      using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / merge.num_heads, head = i % merge.num_heads;
        const Weight lse_a = lse_of(merge.a, token, head), lse_b = lse_of(merge.b, token, head);
        const Weight largest = __builtin_fmax(lse_a, lse_b);
        const bool empty = lse_a == -__builtin_inf() && lse_b == -__builtin_inf();
        const Weight part_a = empty ? 0 : Weight(__builtin_exp(lse_a - largest));
        const Weight part_b = empty ? 0 : Weight(__builtin_exp(lse_b - largest));
        const Weight total = empty ? 1 : part_a + part_b;
        weigh(row_of<T>(merge.a, token, head), part_a / total, row_of<T>(merge.b, token, head), part_b / total,
              reinterpret_cast<T*>(merge.out) + i * merge.head_dim, merge.head_dim);
        merge.lse[head * merge.num_tokens + token] = float(largest + __builtin_log(total));
      }
    }
  });
}

}  // namespace paged::PAGED_ISA
