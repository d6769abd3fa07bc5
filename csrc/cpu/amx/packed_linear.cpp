// Multiplies rows by panels of packed weights, in bfloat16: a panel is packed as tiles take a right factor.
#include "../packed_linear.h"

#include "tiles.h"

namespace paged::avx512 {

cpu::MultiplyPanels multiply_panels;

}  // namespace paged::avx512

namespace paged::PAGED_ISA {
namespace {

using cpu::kPanel;
using cpu::kRowBlock;
using cpu::PackedLinear;

static_assert(kPanel == kPanelColumns && kRowBlock == 2 * kTileRows);

// Rows that are copied at a time, and then multiplied by one panel after the other.
constexpr int64_t kRows = 2 * kRowBlock;
// As far ahead as weights are fetched from memory. 2 cores of a Xeon with AMX, 9,728 x 896, GB/s with 4 steps into the
// first-level cache and with 16 into the second: 8 rows 24.6 and 24.9, 32 rows 20.7 and 23.0, 64 rows 14.8 and 17.1.
constexpr int64_t kStepsAhead = 16;

// Rows [first_row, first_row + rows), and zeros up to `width` elements and a whole number of tiles.
void copy_rows(const PackedLinear& call, int64_t first_row, int64_t rows, int64_t width, BFloat16* to) {
  std::memset(static_cast<void*>(to), 0, (rows + kTileRows - 1) / kTileRows * kTileRows * width * sizeof(BFloat16));
  const BFloat16* from = reinterpret_cast<const BFloat16*>(call.input) + first_row * call.row_stride;
  for (int64_t r = 0; r < rows && call.in_features; ++r, to += width, from += call.row_stride)
    std::memcpy(static_cast<void*>(to), from, call.in_features * sizeof(BFloat16));
}

void write_rows(const PackedLinear& call, int64_t first_row, int64_t rows, int64_t output, const float* sums) {
  const int64_t outputs = call.out_features - output;
  const __mmask32 some = outputs >= kPanel ? ~0u : (1u << outputs) - 1;
  float bias[kPanel] = {};
  if (call.bias)
    for (int64_t o = 0; o < kPanel && o < outputs; ++o)
      bias[o] = to_float(reinterpret_cast<const BFloat16*>(call.bias)[output + o]);
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(call.out) + (first_row + r) * call.out_features + output;
    _mm512_mask_storeu_epi16(to, some,
                             (__m512i)_mm512_cvtne2ps_pbh((__m512)(load(sums + kLanes) + load(bias + kLanes)),
                                                          (__m512)(load(sums) + load(bias))));
  }
}

void multiply(const PackedLinear& call, int64_t begin, int64_t end, float* scratch) {
  BFloat16* const inputs = reinterpret_cast<BFloat16*>(scratch);
  const int64_t pairs = call.num_pairs(), whole = pairs / kTileRows, rest = pairs % kTileRows;
  const int64_t width = (whole + (rest != 0)) * kTileElements;
  for (int64_t first = 0; first < call.num_rows; first += kRows) {
    const int64_t rows = call.num_rows - first < kRows ? call.num_rows - first : kRows;
    copy_rows(call, first, rows, width, inputs);
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint32_t* const weights = reinterpret_cast<const uint32_t*>(call.packed_weight) + panel * pairs * kPanel;
      for (int64_t row = 0; row < rows; row += kRowBlock) {
        const int64_t some = rows - row < kRowBlock ? rows - row : kRowBlock;
        const int tall = some > kTileRows ? 2 : 1;
        const BFloat16* const from = inputs + row * width;
        const auto left_from = [&](int64_t step) {
          const BFloat16* const tiles = from + step * kTileElements;
          return LeftFactor{
              {tiles, tiles + (tall - 1) * kTileRows * width}, width * int64_t(sizeof(BFloat16)), kRowBytes};
        };
        alignas(64) float sums[kRowBlock * kPanel];
        add_tiles(tall, 2, left_from(0), {weights}, whole, sums, kPanel, true, [&](int64_t step) PAGED_INLINED {
          if (row > 0) return;
          const uint32_t* const ahead = weights + (step + kStepsAhead) * kTileRows * kPanel;
          for (int64_t line = 0; line < kTileRows * kPanel; line += kLanes) __builtin_prefetch(ahead + line, 0, 2);
        });
        if (rest) {
          uint32_t last[kTileRows * kPanel] = {};
          std::memcpy(last, weights + whole * kTileRows * kPanel, rest * kPanel * sizeof(uint32_t));
          add_tiles(tall, 2, left_from(whole), {last}, 1, sums, kPanel, false, [](int64_t) {});
        }
        write_rows(call, first + row, some, panel * kPanel, sums);
      }
    }
  }
}

}  // namespace

void multiply_panels(const PackedLinear& call, int64_t begin, int64_t end, float* scratch) {
  if (call.element != Element::kBFloat16) return avx512::multiply_panels(call, begin, end, scratch);
  with_tiles([&] { multiply(call, begin, end, scratch); });
}

}  // namespace paged::PAGED_ISA
