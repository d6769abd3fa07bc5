// Multiplies the rows of an input by the rows of a weight, in bfloat16: weights meet the inputs as they are stored.
#include "../linear.h"

#include "../isa/activation.h"
#include "../isa/weight_block.h"
#include "tiles.h"

namespace paged::avx512 {

bool has_many_rows(const cpu::Linear&);
cpu::MultiplyFewRows multiply_few_rows;
cpu::MultiplyManyRows multiply_many_rows;

}  // namespace paged::avx512

namespace paged::PAGED_ISA {
namespace {

using cpu::kManyOutputs;
using cpu::kManyRows;
using cpu::kTileMostInputs;
using cpu::kTileOutputs;
using cpu::kTilePackedInputs;
using cpu::Linear;

static_assert(kTileOutputs == 2 * kTileRows && kTileOutputs == kChunk && kManyRows % kPanelColumns == 0);

// With many rows: their weights stay in the first-level cache while one panel after the other meets them.
constexpr int64_t kStepsAtOnce = 8;
// Written at a time: with fewer, each of many rows would need its page again too soon.
constexpr int64_t kWrittenOutputs = 256;

PAGED_INLINE int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Where the weights of some outputs and inputs are. In the order in which they are used weights change fastest, then
// the outputs of a block, then its inputs, then blocks.
struct Place {
  int64_t input, output;
  int weight;
};

// Rows and outputs of one call.
class LinearTiles {
 public:
  LinearTiles(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin, int64_t output_end,
              float* scratch)
      : call_(call),
        row_begin_(row_begin),
        num_rows_(row_end - row_begin),
        columns_(num_rows_ > kTileRows ? kPanelColumns : kTileRows),
        num_columns_(round_up(num_rows_, kTileRows)),
        output_begin_(output_begin),
        output_end_(output_end) {
    const int64_t room = kTilePackedInputs / round_up(num_rows_, columns_) / kTileElements * kTileElements;
    block_inputs_ = min(min(room, kTileMostInputs), round_up(call.in_features, kTileElements));
    one_block_ = call.in_features <= block_inputs_;
    block_outputs_ = (one_block_ ? kWrittenOutputs : kManyOutputs) / call.num_weights();
    inputs_ = reinterpret_cast<uint32_t*>(scratch);
    copied_ = reinterpret_cast<BFloat16*>(scratch + kTilePackedInputs / 2);
    sums_ = scratch + (kTilePackedInputs + kTileOutputs * kTileMostInputs) / 2;
  }

  void run() {
    if (one_block_) pack_inputs(0);
    for (Place at{0, output_begin_, 0}; at.output < output_end_;) {
      const bool begins_block = at.output == block_of(at.output) && at.weight == 0;
      if (!one_block_ && begins_block) pack_inputs(at.input);
      const Place next = behind(at);
      multiply(at, NextBlock<BFloat16>(next.output < output_end_ ? block_at(next) : Block<BFloat16>{}));
      if (next.input == 0 && (next.output >= output_end_ || block_of(next.output) > block_of(at.output)))
        write(block_of(at.output));
      at = next;
    }
  }

 private:
  // The first output of a block.
  int64_t block_of(int64_t output) const {
    return output_begin_ + (output - output_begin_) / block_outputs_ * block_outputs_;
  }

  Place behind(const Place& at) const {
    if (at.weight + 1 < call_.num_weights()) return {at.input, at.output, at.weight + 1};
    const int64_t output = at.output + kTileOutputs;
    if (output < output_end_ && block_of(output) == block_of(at.output)) return {at.input, output, 0};
    if (at.input + block_inputs_ < call_.in_features) return {at.input + block_inputs_, block_of(at.output), 0};
    return {0, output, 0};
  }

  Block<BFloat16> block_at(const Place& at) const {
    const cpu::LinearWeight& weight = call_.weights[at.weight];
    const BFloat16* const first = reinterpret_cast<const BFloat16*>(weight.data) + at.output * weight.stride + at.input;
    return {first, min(kTileOutputs, output_end_ - at.output), min(block_inputs_, call_.in_features - at.input),
            weight.stride};
  }

  uint32_t* panel(int64_t row) const { return inputs_ + row * (block_inputs_ / 2); }

  // [panel][kTileOutputs][columns]
  float* sums_of(int weight, int64_t output) const {
    return sums_ + (weight * block_outputs_ + output - block_of(output)) * round_up(num_columns_, columns_);
  }

  void pack_inputs(int64_t input) {
    const int64_t size = min(block_inputs_, call_.in_features - input);
    for (int64_t r = 0; r < num_columns_; r += kTileRows) {
      const int64_t some = min(kTileRows, num_rows_ - r);
      const BFloat16* rows[kTileRows];
      for (int64_t i = 0; i < some; ++i)
        rows[i] = reinterpret_cast<const BFloat16*>(call_.input) + (row_begin_ + r + i) * call_.row_stride + input;
      uint32_t* const to = panel(r / columns_ * columns_) + r % columns_;
      for (int64_t d = 0; d < size; d += kTileElements)
        pack_columns(rows, some, d, size - d, to + d / 2 * columns_, columns_);
    }
  }

  // The block as tiles take it: where it is, unless it does not fill them.
  LeftFactor tiles_of(const Block<BFloat16>& block) {
    const int64_t tall = block.outputs > kTileRows ? 2 : 1;
    if (block.outputs == tall * kTileRows && block.size % kTileElements == 0)
      return {{block.row(0), block.row((tall - 1) * kTileRows)}, block.stride * int64_t(sizeof(BFloat16)), kRowBytes};
    const int64_t width = round_up(block.size, kTileElements);
    std::memset(static_cast<void*>(copied_), 0, tall * kTileRows * width * sizeof(BFloat16));
    for (int64_t o = 0; o < block.outputs && block.size; ++o)
      std::memcpy(static_cast<void*>(copied_ + o * width), block.row(o), block.size * sizeof(BFloat16));
    return {{copied_, copied_ + (tall - 1) * kTileRows * width}, width * int64_t(sizeof(BFloat16)), kRowBytes};
  }

  void multiply(const Place& at, NextBlock<BFloat16> next) {
    const Block<BFloat16> block = block_at(at);
    const LeftFactor left = tiles_of(block);
    const int tall = block.outputs > kTileRows ? 2 : 1;
    const int64_t steps = round_up(block.size, kTileElements) / kTileElements;
    const int64_t panels = (num_columns_ + columns_ - 1) / columns_, lines = (kTileOutputs + panels - 1) / panels;
    next.allow(kTileOutputs);
    float* const sums = sums_of(at.weight, at.output);
    const int64_t parts = panels == 1 ? 1 : (steps + kStepsAtOnce - 1) / kStepsAtOnce;
    const int64_t at_once = parts > 1 ? (steps + parts - 1) / parts : steps;
    int64_t s = 0;
    do {
      const auto* const tiles = reinterpret_cast<const char* const*>(left.tiles);
      const LeftFactor part = {{tiles[0] + s * kRowBytes, tiles[1] + s * kRowBytes}, left.stride, kRowBytes};
      for (int64_t r = 0; r < num_columns_; r += columns_)
        add_tiles(tall, num_columns_ - r > kTileRows ? 2 : 1, part, {panel(r) + s * kTileRows * columns_, columns_},
                  min(at_once, steps - s), sums + r * kTileOutputs, columns_, at.input == 0 && s == 0,
                  [&](int64_t) PAGED_INLINED {
                    for (int64_t i = 0; i < lines; ++i) next.prefetch();
                  });
      s += at_once;
    } while (s < steps);
  }

  void write(int64_t first) {
    const int64_t end = min(first + block_outputs_, output_end_);
    float bias[2][kManyOutputs] = {};
    for (int w = 0; w < call_.num_weights(); ++w)
      if (const char* const from = call_.weights[w].bias)
        for (int64_t o = first; o < end; ++o) bias[w][o - first] = to_float(reinterpret_cast<const BFloat16*>(from)[o]);
    for (int64_t r = 0; r < num_rows_; r += kTileRows)
      for (int64_t o = first; o < end; o += kTileOutputs)
        write_tile(r, o, min(kTileOutputs, end - o), bias[0] + o - first, bias[1] + o - first);
  }

  // Outputs [output, output + outputs) of rows [row, row + kTileRows).
  void write_tile(int64_t row, int64_t output, int64_t outputs, const float* bias, const float* second_bias) {
    const int halves = outputs > kTileRows ? 2 : 1;
    const __mmask32 some = outputs == kTileOutputs ? ~0u : (1u << outputs) - 1;
    Vec block[2][2][kTileRows];  // [weight][half of the outputs][row]
    for (int w = 0; w < call_.num_weights(); ++w) {
      const float* const sums = sums_of(w, output) + row / columns_ * columns_ * kTileOutputs + row % columns_;
      for (int half = 0; half < halves; ++half) {
        for (int i = 0; i < kTileRows; ++i) block[w][half][i] = load(sums + (half * kTileRows + i) * columns_);
        transpose(block[w][half]);
      }
    }
    for (int64_t i = 0; i < min(kTileRows, num_rows_ - row); ++i) {
      Vec sum[2] = {};
      for (int half = 0; half < halves; ++half) {
        sum[half] = block[0][half][i] + load(bias + half * kLanes);
        if (call_.num_weights() == 2)
          sum[half] = activate(call_.activation, sum[half]) * (block[1][half][i] + load(second_bias + half * kLanes));
      }
      BFloat16* const to =
          reinterpret_cast<BFloat16*>(call_.out) + (row_begin_ + row + i) * call_.out_features + output;
      _mm512_mask_storeu_epi16(to, some, (__m512i)_mm512_cvtne2ps_pbh((__m512)sum[1], (__m512)sum[0]));
    }
  }

  const Linear& call_;
  const int64_t row_begin_, num_rows_, columns_, num_columns_, output_begin_, output_end_;
  int64_t block_inputs_, block_outputs_;
  bool one_block_;
  uint32_t* inputs_;  // [panel][block_inputs / 2][columns]
  BFloat16* copied_;  // [kTileOutputs][inputs]
  float* sums_;       // [weight][kTileOutputs of a block's][panel][output][column]
};

bool has_tiles_for(const Linear& call) { return call.element == Element::kBFloat16; }

}  // namespace

bool has_many_rows(const Linear& call) {
  return has_tiles_for(call) ? call.num_rows > kPanelColumns : avx512::has_many_rows(call);
}

int64_t few_rows_scratch_floats(const Linear& call) {
  return has_tiles_for(call) ? cpu::amx_scratch_floats(call) : cpu::few_rows_scratch_floats(call);
}

int64_t many_rows_scratch_floats(const Linear& call) {
  return has_tiles_for(call) ? cpu::amx_scratch_floats(call) : cpu::many_rows_scratch_floats(call);
}

void multiply_few_rows(const Linear& call, int64_t begin, int64_t end, float* scratch) {
  if (!has_tiles_for(call)) return avx512::multiply_few_rows(call, begin, end, scratch);
  with_tiles([&] { LinearTiles(call, 0, call.num_rows, begin, end, scratch).run(); });
}

void multiply_many_rows(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin,
                        int64_t output_end, float* scratch) {
  if (!has_tiles_for(call))
    return avx512::multiply_many_rows(call, row_begin, row_end, output_begin, output_end, scratch);
  with_tiles([&] { LinearTiles(call, row_begin, row_end, output_begin, output_end, scratch).run(); });
}

}  // namespace paged::PAGED_ISA
