// Multiplies many rows by the rows of a weight: both are packed in blocks that stay in the caches while they are used.
#include "../linear.h"
#include "activation.h"
#include "products.h"
#include "weight_block.h"

namespace paged::PAGED_ISA {
namespace {

using cpu::kManyInputs;
using cpu::kManyOutputs;
using cpu::kManyRows;
using cpu::Linear;

static_assert(kManyRows % kChunk == 0 && kManyInputs % kChunk == 0 && kManyOutputs % kChunk == 0);

// A chunk of a row, or the `count` elements that are left, as vectors of factors: in an order of its own, which is the
// same for inputs and weights.
template <class T>
PAGED_INLINE void load_chunk_of_factors(FloatFactors, const T* row, int64_t count, Vec* factors) {
  const Chunk chunk = load_chunk(row, count);
  factors[0] = chunk.first;
  factors[1] = chunk.second;
}
#if defined(__AVX512BF16__)
PAGED_INLINE void load_chunk_of_factors(BFloat16Factors, const BFloat16* row, int64_t count, Vec* factors) {
  factors[0] = (Vec)_mm512_maskz_loadu_epi16(count >= kChunk ? ~0u : (1u << count) - 1, row);
}
#endif

// A block of rows and outputs: sums [output][row] of one block of inputs after the other.
template <class T, class Factors>
struct ManyRows {
  using Factor = typename Factors::Factor;
  static constexpr int kVectors = 2 / Factors::kTerms;  // of a chunk's factors
  static constexpr int64_t kFactors = kManyInputs / Factors::kTerms;
  static constexpr int kOutputs = 2 * kBlock;  // at a time
  static_assert(kOutputs <= cpu::kMostOutputsAtOnce && kManyOutputs % kOutputs == 0 && kOutputs % kLanes == 0);

  const Linear& call;
  int64_t rows_of_panels;
  float* sums;      // [weight][most_outputs()][rows_of_panels]
  Factor* inputs;   // [panel][factor][row of the panel]
  Factor* weights;  // [kOutputs][factor]

  ManyRows(const Linear& call, int64_t rows, float* scratch)
      : call(call), rows_of_panels((rows + kLanes - 1) / kLanes * kLanes), sums(scratch) {
    scratch += kManyOutputs * kManyRows;
    inputs = reinterpret_cast<Factor*>(scratch);
    weights = inputs + kManyRows * kFactors;
  }

  const T* input_row(int64_t row) const { return reinterpret_cast<const T*>(call.input) + row * call.row_stride; }
  int64_t most_outputs() const { return kManyOutputs / call.num_weights(); }
  float* sums_of(int weight) const { return sums + weight * most_outputs() * rows_of_panels; }

  // Rows of a panel: kChunk, or kLanes of the last one if there are no more.
  static int64_t panel_rows(int64_t rows_left) { return rows_left > kLanes ? kChunk : kLanes; }

  void pack_inputs(int64_t first_row, int64_t rows, int64_t first_input, int64_t size) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t panel = r / kChunk * kChunk, stride = panel_rows(rows - panel), count = min(kLanes, rows - r);
      for (int64_t d = 0; d < size; d += kChunk) {
        Vec part[kVectors][kLanes] = {};
        for (int64_t i = 0; i < count; ++i) {
          Vec factors[kVectors];
          load_chunk_of_factors(Factors{}, input_row(first_row + r + i) + first_input + d, size - d, factors);
          for (int v = 0; v < kVectors; ++v) part[v][i] = factors[v];
        }
        Factor* const to = inputs + panel * kFactors + d / Factors::kTerms * stride + r - panel;
        for (int v = 0; v < kVectors; ++v) {
          transpose(part[v]);
          for (int i = 0; i < kLanes; ++i) store_as(to + (v * kLanes + i) * stride, part[v][i]);
        }
      }
    }
  }

  void pack_weights(const Block<T>& block) {
    for (int64_t o = 0; o < kOutputs; ++o) {
      const T* const from = block.row(min(o, block.outputs - 1));
      for (int64_t d = 0; d < block.size; d += kChunk) {
        Vec factors[kVectors];
        load_chunk_of_factors(Factors{}, from + d, block.size - d, factors);
        for (int v = 0; v < kVectors; ++v)
          store_as(weights + o * kFactors + d / Factors::kTerms + v * kLanes, factors[v]);
      }
    }
  }

  // sums [scalars][rows_of_panels] += weights x inputs
  template <int scalars, int vectors>
  void add_product(const Factor* some_weights, const Factor* panel, int64_t factors, float* to, bool first,
                   NextBlock<T>& next) {
    // As fast as weights are used.
    constexpr int used = scalars * Factors::kTerms, often = used < kChunk ? kChunk / used : 1;
    NextBlock<T> fetched = next;  // in registers
    Vec product[scalars * vectors];
    multiply<Factors, scalars, vectors>(
        some_weights, kFactors, 1, panel, factors, product, [&](int64_t k) PAGED_INLINED {
          if (k % often == 0) unrolled<(used + kChunk - 1) / kChunk>([&](auto) PAGED_INLINED { fetched.prefetch(); });
        });
    next = fetched;
    for (int i = 0; i < scalars; ++i)
      for (int v = 0; v < vectors; ++v) {
        float* const sum = to + i * rows_of_panels + v * kLanes;
        store(sum, first ? product[i * vectors + v] : load(sum) + product[i * vectors + v]);
      }
  }

  void add_products(int64_t rows, const Block<T>& block, float* sums_of_block, bool first) {
    const int64_t factors = (block.size + kChunk - 1) / kChunk * kChunk / Factors::kTerms;
    for (int64_t o = 0; o < block.outputs; o += kOutputs) {
      pack_weights(block.part(o, kOutputs));
      NextBlock<T> next(block.part(o + kOutputs, kOutputs));
      next.allow(kOutputs);
      for (int64_t r = 0; r < rows; r += kChunk) {
        float* const to = sums_of_block + o * rows_of_panels + r;
        if (panel_rows(rows - r) == kLanes) {
          add_product<kOutputs, 1>(weights, inputs + r * kFactors, factors, to, first, next);
        } else {
          for (int part = 0; part < kOutputs; part += kBlock)
            add_product<kBlock, 2>(weights + part * kFactors, inputs + r * kFactors, factors,
                                   to + part * rows_of_panels, first, next);
        }
      }
    }
  }

  // Outputs [o, o + kLanes) of rows [r, r + kLanes), a row in each vector.
  void load_block(int weight, int64_t r, int64_t o, Vec* block) const {
    for (int i = 0; i < kLanes; ++i) block[i] = load(sums_of(weight) + (o + i) * rows_of_panels + r);
    transpose(block);
  }

  void write(int64_t first_row, int64_t rows, int64_t first_output, int64_t outputs) {
    float bias[2][kManyOutputs] = {};
    for (int w = 0; w < call.num_weights(); ++w)
      if (call.weights[w].bias)
        for (int64_t o = 0; o < outputs; ++o)
          bias[w][o] = to_float(reinterpret_cast<const T*>(call.weights[w].bias)[first_output + o]);
    // A chunk of a row at a time: with less, lines would leave the cache half written.
    for (int64_t chunk = 0; chunk < outputs; chunk += kChunk)
      for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t o = chunk; o < min(chunk + kChunk, outputs); o += kLanes) {
          Vec block[kLanes], gated[kLanes];
          load_block(0, r, o, block);
          if (call.num_weights() == 2) load_block(1, r, o, gated);
          for (int64_t i = 0; i < min(kLanes, rows - r); ++i) {
            Vec sum = block[i] + load(bias[0] + o);
            if (call.num_weights() == 2) sum = activate(call.activation, sum) * (gated[i] + load(bias[1] + o));
            T* const to = reinterpret_cast<T*>(call.out) + (first_row + r + i) * call.out_features + first_output + o;
            narrow(to, sum, outputs - o);
          }
        }
  }
};

template <class T, class Factors>
void multiply(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin, int64_t output_end,
              float* scratch) {
  const int64_t rows = row_end - row_begin;
  ManyRows<T, Factors> block(call, rows, scratch);
  for (int64_t output = output_begin; output < output_end; output += block.most_outputs()) {
    const int64_t outputs = min(block.most_outputs(), output_end - output);
    int64_t input = 0;
    do {
      const int64_t size = min(kManyInputs, call.in_features - input);
      block.pack_inputs(row_begin, rows, input, size);
      for (int w = 0; w < call.num_weights(); ++w) {
        const cpu::LinearWeight& weight = call.weights[w];
        const T* const from = reinterpret_cast<const T*>(weight.data) + output * weight.stride + input;
        block.add_products(rows, {from, outputs, size, weight.stride}, block.sums_of(w), input == 0);
      }
      input += kManyInputs;
    } while (input < call.in_features);
    block.write(row_begin, rows, output, outputs);
  }
}

}  // namespace

// 4,864 x 896, GFLOP/s as few and as many rows. 2 cores of a 4th generation Xeon, bfloat16 multiplied as float32: 8
// rows 138 and 104, 12 rows 158 and 150, 16 rows 165 and 210, 32 rows 182 and 245, 512 rows 222 and 292; 20 rows 175 as
// few, 24 rows 177 as many: vectors of 16 rows are empty in part. float32: 16 rows 132 and 170, 32 rows 172 and 205. 2
// cores of an AMD EPYC, Zen 4, bfloat16: 12 rows 264 as few, 16 rows 295 and 267, 24 rows 329 and 266, 28 rows 322 and
// 306, 32 rows 357 and 365; float32: 16 rows 149 and 153, 24 rows 165 and 131, 32 rows 182 and 173.
bool has_many_rows(const Linear& call) {
  const int64_t num_rows = call.num_rows;
#if defined(__AVX512BF16__)
  return num_rows > 28;
#else
  return num_rows > 12 && (num_rows <= 16 || num_rows >= 24);
#endif
}

void multiply_many_rows(const Linear& call, int64_t row_begin, int64_t row_end, int64_t output_begin,
                        int64_t output_end, float* scratch) {
  switch (call.element) {
    case Element::kBFloat16:
      return multiply<BFloat16, BFloat16Factors>(call, row_begin, row_end, output_begin, output_end, scratch);
    case Element::kFloat16:
      return multiply<Float16, FloatFactors>(call, row_begin, row_end, output_begin, output_end, scratch);
    default: return multiply<float, FloatFactors>(call, row_begin, row_end, output_begin, output_end, scratch);
  }
}

}  // namespace paged::PAGED_ISA
