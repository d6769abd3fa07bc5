// Multiplies few rows by the rows of a weight, both as they are stored, summing in float32.
#include <type_traits>

#include "../linear.h"
#include "activation.h"
#include "dots.h"
#include "weight_block.h"

namespace paged::PAGED_ISA {
namespace {

using cpu::kInputBlock;
using cpu::kOutputBlock;
using cpu::Linear;

static_assert(kOutputBlock % kAccumulators == 0 && kInputBlock % kChunk == 0);

// Of a tile; its outputs are as many as there are sums for.
constexpr int kTileRows = 4;
constexpr int outputs_of(int rows) { return kAccumulators / (rows == 3 ? kTileRows : rows); }

// sums [rows][outputs] += inputs x weights, for rows [0, rows) of the packed inputs and `outputs` rows of the weights.
template <class Dot, int rows, int fetches, class T>
void multiply_tile(const typename Dot::Packed* inputs, int64_t input_stride, const Block<T>& block, int64_t first,
                   float* sums_of_rows, NextBlock<T>& next) {
  constexpr int outputs = outputs_of(rows);
  const T* weights[outputs];
  for (int o = 0; o < outputs; ++o) weights[o] = block.row(min(first + o, block.outputs - 1));
  Vec sum[kAccumulators] = {};
  const auto add = [&](const T* const* from, int64_t at, int64_t d) PAGED_INLINED {
    typename Dot::PackedPart input[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) input[r] = Dot::load_packed(inputs + r * input_stride + d);
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o) {
      const typename Dot::Part parts = Dot::template load_parts<1>(from[o] + at, from[o] + at);
      if (o < fetches) next.prefetch();
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r * outputs + o] = Dot::multiply_add(sum[r * outputs + o], parts, input[r]);
    }
  };
  const int64_t whole = block.size / kChunk * kChunk;
  for (int64_t d = 0; d < whole; d += kChunk) add(weights, d, d);
  if (whole < block.size) {
    T padded[outputs][kChunk] = {};
    const T* tails[outputs];
    for (int o = 0; o < outputs; ++o) {
      std::memcpy(static_cast<void*>(padded[o]), weights[o] + whole, (block.size - whole) * sizeof(T));
      tails[o] = padded[o];
    }
    add(tails, 0, whole);
  }
  float lanes[kAccumulators];
#pragma GCC unroll 4
  for (int v = 0; v < kAccumulators; v += kLanes) store(lanes + v, sums<1>(sum + v));
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    float* const to = sums_of_rows + r * kOutputBlock + first;
    for (int o = 0; o < outputs; ++o) to[o] += lanes[r * outputs + o];
  }
}

// The same for all outputs of the block.
template <class Dot, int rows, class T>
void multiply_block(const typename Dot::Packed* inputs, int64_t input_stride, const Block<T>& block,
                    float* sums_of_rows, NextBlock<T>& next, int64_t groups, int64_t& tile) {
  constexpr int outputs = outputs_of(rows);
  for (int64_t first = 0; first < block.outputs; first += outputs, ++tile) {
    const int64_t fetches = (tile + 1) * outputs / groups - tile * outputs / groups;
    next.allow(outputs);
    const auto multiply = [&](auto n) {
      multiply_tile<Dot, rows, n>(inputs, input_stride, block, first, sums_of_rows, next);
    };
    if (fetches == 0)
      multiply(std::integral_constant<int, 0>{});
    else if (fetches == 1)
      multiply(std::integral_constant<int, 1>{});
    else if (fetches == 2)
      multiply(std::integral_constant<int, 2>{});
    else
      multiply(std::integral_constant<int, outputs>{});
  }
}

template <class Dot, class T>
void multiply_block(const typename Dot::Packed* inputs, int64_t input_stride, int64_t rows, const Block<T>& block,
                    float* sums_of_rows, NextBlock<T> next) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  int64_t tile = 0;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const auto multiply = [&](auto n) {
      multiply_block<Dot, n>(inputs + row * input_stride, input_stride, block, sums_of_rows + row * kOutputBlock, next,
                             groups, tile);
    };
    switch (rows - row) {
      case 1: multiply(std::integral_constant<int, 1>{}); break;
      case 2: multiply(std::integral_constant<int, 2>{}); break;
      case 3: multiply(std::integral_constant<int, 3>{}); break;
      default: multiply(std::integral_constant<int, kTileRows>{});
    }
  }
}

// Zeros after the end of the row, up to a whole chunk.
template <class Dot, class T>
void pack_row(const T* row, int64_t size, typename Dot::Packed* packed) {
  int64_t d = 0;
  for (; d + kChunk <= size; d += kChunk) Dot::pack(packed + d, Dot::template load_parts<1>(row + d, row + d));
  if (d == size) return;
  T padded[kChunk] = {};
  std::memcpy(static_cast<void*>(padded), row + d, (size - d) * sizeof(T));
  Dot::pack(packed + d, Dot::template load_parts<1>(padded, padded));
}

template <class T>
void begin_sums(const char* bias, int64_t rows, int64_t first, int64_t outputs, float* sums_of_rows) {
  std::memset(sums_of_rows, 0, rows * kOutputBlock * sizeof(float));
  if (!bias) return;
  for (int64_t o = 0; o < outputs; ++o) sums_of_rows[o] = to_float(reinterpret_cast<const T*>(bias)[first + o]);
  for (int64_t r = 1; r < rows; ++r)
    std::memcpy(sums_of_rows + r * kOutputBlock, sums_of_rows, outputs * sizeof(float));
}

template <class T>
void write_sums(const Linear& call, int64_t first, int64_t outputs, const float* sums_of_rows) {
  for (int64_t r = 0; r < call.num_rows; ++r) {
    T* const to = reinterpret_cast<T*>(call.out) + r * call.out_features + first;
    for (int64_t o = 0; o < outputs; o += kLanes) {
      Vec sum = load(sums_of_rows + r * kOutputBlock + o);
      if (call.num_weights() == 2)
        sum = activate(call.activation, sum) * load(sums_of_rows + (call.num_rows + r) * kOutputBlock + o);
      narrow(to + o, sum, outputs - o);
    }
  }
}

// Where the blocks of a call are, in the order in which they are used: inputs, weights, outputs.
struct Place {
  int64_t output, input;
  int weight;

  Place next(const Linear& call) const {
    if (input + kInputBlock < call.in_features) return {output, input + kInputBlock, weight};
    if (weight + 1 < call.num_weights()) return {output, 0, weight + 1};
    return {output + kOutputBlock, 0, 0};
  }
};

template <class Dot, class T>
void multiply(const Linear& call, int64_t begin, int64_t end, float* scratch) {
  using Packed = typename Dot::Packed;
  const int64_t rows = call.num_rows;
  float* const sums = scratch;  // [weight][row][kOutputBlock]
  Packed* const packed = reinterpret_cast<Packed*>(sums + 2 * rows * kOutputBlock);
  const Packed* inputs = packed;
  int64_t stride = (call.in_features + kChunk - 1) / kChunk * kChunk;
  const T* const from = reinterpret_cast<const T*>(call.input);
  bool in_place = false;
  if constexpr (std::is_same_v<Packed, T>) {
    in_place = call.in_features % kChunk == 0;
    if (in_place) inputs = from, stride = call.row_stride;
  }
  if (!in_place)
    for (int64_t r = 0; r < rows; ++r) pack_row<Dot>(from + r * call.row_stride, call.in_features, packed + r * stride);
  const auto block_at = [&](const Place& at) {
    const cpu::LinearWeight& weight = call.weights[at.weight];
    const T* const first = reinterpret_cast<const T*>(weight.data) + at.output * weight.stride + at.input;
    return Block<T>{first, min(kOutputBlock, end - at.output), min(kInputBlock, call.in_features - at.input),
                    weight.stride};
  };
  for (Place at{begin, 0, 0}; at.output < end;) {
    const int64_t output = at.output, outputs = min(kOutputBlock, end - output);
    for (int w = 0; w < call.num_weights(); ++w)
      begin_sums<T>(call.weights[w].bias, rows, output, outputs, sums + w * rows * kOutputBlock);
    while (at.output == output) {
      const Place next = at.next(call);
      multiply_block<Dot>(inputs + at.input, stride, rows, block_at(at), sums + at.weight * rows * kOutputBlock,
                          NextBlock<T>(next.output < end ? block_at(next) : Block<T>{}));
      at = next;
    }
    write_sums<T>(call, output, outputs, sums);
  }
}

}  // namespace

void multiply_few_rows(const Linear& call, int64_t begin, int64_t end, float* scratch) {
  switch (call.element) {
    case Element::kBFloat16: return multiply<BFloat16Dot, BFloat16>(call, begin, end, scratch);
    case Element::kFloat16: return multiply<FloatDot<Float16>, Float16>(call, begin, end, scratch);
    default: return multiply<FloatDot<float>, float>(call, begin, end, scratch);
  }
}

}  // namespace paged::PAGED_ISA
