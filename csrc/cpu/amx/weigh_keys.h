// The online softmax over a tile of scores [key][row], into pairs of weights as tiles multiply them.
#pragma once

#include "../isa/attention_rows.h"
#include "tiles.h"

namespace paged::PAGED_ISA {
namespace {

// Keys of a tile that a panel of rows works on, counted within the tile: `begin` is a multiple of 32.
struct PanelKeys {
  int64_t begin, end;
  int64_t visible_begin, visible_end;  // to every row of the panel

  bool all_visible() const { return visible_begin == begin && visible_end == end; }
  int64_t steps() const { return (end - begin + kTileElements - 1) / kTileElements; }
};

// 2^x, 0 for minus infinity; NaN stays NaN. Relative error 3e-6, where bfloat16's is 2e-3.
PAGED_INLINE Vec exp2_for_bfloat16(Vec x) {
  constexpr int kFraction = 1;  // x less the largest whole number below it
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, kFraction);
  Vec p = splat(1.3534167e-2f);
  p = p * r + 5.2011464e-2f;
  p = p * r + 2.4144275e-1f;
  p = p * r + 6.9300383e-1f;
  p = p * r + 1.0000026f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// The upper half of each lane is the bfloat16 nearest to the float, of two equally near the larger; none is negative.
PAGED_INLINE BitVec weight_pairs(Vec first, Vec second) {
  const BitVec half = BitVec{} + 0x8000;
  return ((BitVec)first + half) >> 16 | (((BitVec)second + half) & 0xffff0000);
}

// The 16 rows in the lanes of one of a panel's vectors, and their scores.
struct WeighedRows {
  Rows& rows;
  int vector;
  float* scores;

  Vec score(int64_t key) const { return load(at(key)); }
  float* at(int64_t key) const { return scores + key * kPanelColumns + vector * kLanes; }

  // From products to exponents of 2.
  void scale(const Scoring& how, int64_t first_key, int64_t begin, int64_t end) const {
    const Vec slope = load(rows.slope + vector * kLanes);
    const IntVec position = load_as<IntVec>(rows.position + vector * kLanes);
    for (int64_t k = begin; k < end; ++k) {
      Vec x = score(k) * how.scale;
      if (how.has_softcap) x = tanh(x) * how.softcap;
      if (how.has_slopes) x += slope * __builtin_convertvector(int32_t(first_key + k) - position, Vec);
      store(at(k), x);
    }
  }

  // Of keys that not every row sees.
  void mask(int64_t least_key, int64_t first_key, int64_t begin, int64_t end) const {
    const IntVec from = load_as<IntVec>(rows.begin + vector * kLanes), to = load_as<IntVec>(rows.end + vector * kLanes);
    for (int64_t k = begin; k < end; ++k) {
      const IntVec key = splat(int32_t(first_key + k));
      const IntVec seen = (key >= from) & (key < to) & (key >= int32_t(least_key));
      store(at(k), select(seen, score(k), splat(-kInfinity)));
    }
  }

  // Weights relative to the rows' maxima, or to what these were before; whether that has changed.
  bool weigh(float scale, int64_t begin, int64_t end, uint32_t* weights) const {
    Vec largest[4];
    for (Vec& some : largest) some = splat(-kInfinity);
    int64_t k = begin;
    for (; k + 4 <= end; k += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) largest[i] = larger(score(k + i), largest[i]);
    for (; k < end; ++k) largest[0] = larger(score(k), largest[0]);
    const Vec in_all = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])) * scale;

    // A maximum may stay behind by so much, so that what was summed before is seldom multiplied, as in
    // FlashAttention-4.
    constexpr float kBehind = 8;
    const Vec before = load(rows.maximum + vector * kLanes), after = select(in_all > before + kBehind, in_all, before);
    const Vec reference = select(after == -kInfinity, Vec{}, after);
    const Vec correction = exp2_nonpositive(before - reference);
    Vec sum = load(rows.sum + vector * kLanes) * correction, second_sum = {};
    const auto weight = [&](int64_t key) PAGED_INLINED {
      return exp2_for_bfloat16((Vec)_mm512_fmsub_ps((__m512)score(key), (__m512)splat(scale), (__m512)reference));
    };
    uint32_t* to = weights + begin / 2 * kPanelColumns + vector * kLanes;
    for (k = begin; k + 2 <= end; k += 2, to += kPanelColumns) {
      const Vec first = weight(k), second = weight(k + 1);
      sum += first;
      second_sum += second;
      store_as(to, weight_pairs(first, second));
    }
    if (k < end) {
      const Vec last = weight(k);
      sum += last;
      store_as(to, weight_pairs(last, Vec{}));
      k += 2, to += kPanelColumns;
    }
    for (; k % kTileElements != 0; k += 2, to += kPanelColumns) store_as(to, BitVec{});
    store(rows.maximum + vector * kLanes, after);
    store(rows.correction + vector * kLanes, correction);
    store(rows.sum + vector * kLanes, sum + second_sum);
    return _mm512_cmp_ps_mask((__m512)correction, _mm512_set1_ps(1), _CMP_NEQ_UQ) != 0;
  }

 private:
  PAGED_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
};

// Turns scores into weights [pair of keys][row], 0 for the rest of a pair and of a tile; tells whether what was summed
// before has to be multiplied by the rows' corrections.
static inline bool weigh_keys(Rows& rows, int wide, const Scoring& how, float* scores, int64_t first_key,
                              int64_t least_key, const PanelKeys& keys, uint32_t* weights) {
  const bool scaled = how.has_softcap || how.has_slopes || !(how.scale > 0);
  bool changed = false;
  for (int v = 0; v < wide; ++v) {
    const WeighedRows some = {rows, v, scores};
    if (scaled) some.scale(how, first_key, keys.begin, keys.end);
    some.mask(least_key, first_key, keys.begin, keys.visible_begin);
    some.mask(least_key, first_key, keys.visible_end, keys.end);
    changed |= some.weigh(scaled ? 1 : how.scale, keys.begin, keys.end, weights);
  }
  return changed;
}

// accumulated [width][row]
static inline void correct_rows(const Rows& rows, int wide, int64_t width, float* accumulated) {
  for (int v = 0; v < wide; ++v) {
    const Vec correction = load(rows.correction + v * kLanes);
    for (int64_t d = 0; d < width; ++d) {
      float* const at = accumulated + d * kPanelColumns + v * kLanes;
      store(at, load(at) * correction);
    }
  }
}

}  // namespace
}  // namespace paged::PAGED_ISA
