// Weighs two attention outputs by exp(lse); a side with lse -inf saw no key and is not read.
#include "merge_attention_states.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "grain.h"

namespace paged::cpu {
namespace {

template <class T>
const T* row_of(const AttentionState& state, int64_t token, int64_t head) {
  return reinterpret_cast<const T*>(state.out) + token * state.token_stride + head * state.head_stride;
}

float lse_of(const AttentionState& state, int64_t token, int64_t head) {
  return state.lse[head * state.lse_head_stride + token * state.lse_token_stride];
}

// out = weight_a * a + weight_b * b, where a weight of 0 keeps NaN out.
template <class T>
void weigh(const T* a, Compute<T> weight_a, const T* b, Compute<T> weight_b, T* out, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; ++d) {
    Compute<T> sum = 0;
    if (weight_a != 0) sum += weight_a * Compute<T>(a[d]);
    if (weight_b != 0) sum += weight_b * Compute<T>(b[d]);
    out[d] = T(sum);
  }
}

}  // namespace

void merge_attention_states(const AttentionState& a, const AttentionState& b, char* out, float* lse, Element element,
                            int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
  with_type(element, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (is_number<T>) {
      using C = Compute<T>;
      const int64_t row_bytes = 3 * head_dim * int64_t(sizeof(T));
      torch::stable::parallel_for(0, num_tokens * num_heads, grain(row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t token = i / num_heads, head = i % num_heads;
          const C lse_a = lse_of(a, token, head), lse_b = lse_of(b, token, head);
          const C largest = std::fmax(lse_a, lse_b);
          const bool empty = largest == -std::numeric_limits<C>::infinity();
          const C part_a = empty ? 0 : std::exp(lse_a - largest), part_b = empty ? 0 : std::exp(lse_b - largest);
          const C total = empty ? 1 : part_a + part_b;
          weigh(row_of<T>(a, token, head), part_a / total, row_of<T>(b, token, head), part_b / total,
                reinterpret_cast<T*>(out) + i * head_dim, head_dim);
          lse[head * num_tokens + token] = float(largest + std::log(total));
        }
      });
    }
  });
}

}  // namespace paged::cpu
