// Divides rows by their root mean square, summed in float32, and multiplies them by a weight.
#include "../rms_norm.h"

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

// As T holds it.
PAGED_INLINE Chunk rounded(float*, Chunk c) { return c; }
template <class T>
PAGED_INLINE Chunk rounded(T* scratch, Chunk c) {
  store_chunk(scratch, c);
  return load_chunk(scratch);
}

template <class T>
float mean_of_squares(const T* row, int64_t size) {
  Chunk sum[2] = {};
  for (int64_t d = 0; d < size; d += 2 * kChunk)
    for (int i = 0; i < 2 && d + i * kChunk < size; ++i) {
      const Chunk c = load_chunk(row + d + i * kChunk, size - d - i * kChunk);
      sum[i].first += c.first * c.first;
      sum[i].second += c.second * c.second;
    }
  float lanes[kLanes], total = 0;
  store(lanes, (sum[0].first + sum[0].second) + (sum[1].first + sum[1].second));
  for (const float lane : lanes) total += lane;
  return total / float(size);
}

template <class T>
void normalise(const cpu::RmsNorm& call, int64_t begin, int64_t end) {
  const T* const weight = reinterpret_cast<const T*>(call.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* const row = reinterpret_cast<const T*>(call.input) + r * call.row_stride;
    T* const out = reinterpret_cast<T*>(call.out) + r * call.size;
    const float factor = 1 / __builtin_sqrtf(mean_of_squares(row, call.size) + call.eps);
    for (int64_t d = 0; d < call.size; d += kChunk) {
      const int64_t count = call.size - d;
      const Chunk x = load_chunk(row + d, count), w = load_chunk(weight + d, count);
      T scratch[kChunk];
      const Chunk normal = rounded(scratch, {x.first * factor, x.second * factor});
      store_chunk(out + d, {normal.first * w.first, normal.second * w.second}, count);
    }
  }
}

}  // namespace

void normalise_rows(const cpu::RmsNorm& call, int64_t begin, int64_t end) {
  switch (call.element) {
    case Element::kBFloat16: return normalise<BFloat16>(call, begin, end);
    case Element::kFloat16: return normalise<Float16>(call, begin, end);
    default: return normalise<float>(call, begin, end);
  }
}

}  // namespace paged::PAGED_ISA
