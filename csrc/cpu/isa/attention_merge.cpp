// Merges the partial results of rows whose keys were split, by their maxima and sums.
#include "attention_rows.h"

namespace paged::PAGED_ISA {
namespace {

template <class T>
void merge(const AttentionCall& call, const AttentionWork* pieces, int64_t count, float* partials) {
  const int64_t width = padded(call.v_head_dim), rows = rows_of(pieces[0]);
  float* first = partials + pieces[0].partial;
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = -kInfinity, sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float of_piece = partials[pieces[i].partial + rows * width + row];
      if (of_piece > maximum) maximum = of_piece;
    }
    const float reference = maximum == -kInfinity ? 0 : maximum;
    for (int64_t i = 0; i < count; ++i) {
      const float* piece = partials + pieces[i].partial;
      const float weight = __builtin_exp2f(piece[rows * width + row] - reference);
      sum += weight * piece[rows * (width + 1) + row];
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec more = load(piece + row * width + d) * weight;
        store(first + row * width + d, i ? load(first + row * width + d) + more : more);
      }
    }
    write_row<T>(call, pieces[0], row, first + row * width, maximum, sum);
  }
}

}  // namespace

void attention_merge_float32(const AttentionCall& call, const AttentionWork* pieces, int64_t count, float* partials) {
  merge<float>(call, pieces, count, partials);
}
void attention_merge_bfloat16(const AttentionCall& call, const AttentionWork* pieces, int64_t count, float* partials) {
  merge<BFloat16>(call, pieces, count, partials);
}
void attention_merge_float16(const AttentionCall& call, const AttentionWork* pieces, int64_t count, float* partials) {
  merge<Float16>(call, pieces, count, partials);
}

}  // namespace paged::PAGED_ISA
