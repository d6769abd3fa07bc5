// Attention of many query rows that share a KV head, in bfloat16: keys meet the queries as they lie in their blocks,
// values are turned once for all rows.
#include "../isa/attention_rows.h"
#include "../isa/cached_rows.h"
#include "tiles.h"
#include "weigh_keys.h"

namespace paged::PAGED_ISA {
namespace {

constexpr int kPanels = kTilePrefillRows / kPanelColumns;
static_assert(kPanelColumns == kChunk && kTilePrefillRows % kPanelColumns == 0 && kTileElements == kChunk);
static_assert(kWeighedKeys % kTileElements == 0 && kWeighedKeys % kPanels == 0);

// One piece of work, with what it keeps packed in the scratch memory.
class TilePrefill {
 public:
  TilePrefill(const AttentionCall& call, const AttentionWork& work, float* scratch)
      : call_(call),
        work_(work),
        count_(rows_of(work)),
        panels_((count_ + kPanelColumns - 1) / kPanelColumns),
        key_width_(padded(call.head_dim)),
        value_width_(padded(call.v_head_dim)) {
    const auto take = [&](int64_t floats) {
      float* taken = scratch;
      scratch += floats;
      return taken;
    };
    query_ = reinterpret_cast<uint32_t*>(take(kTilePrefillRows * key_width_ / 2));
    keys_ = reinterpret_cast<BFloat16*>(take(kWeighedKeys * key_width_ / 2));
    values_ = reinterpret_cast<BFloat16*>(take(kWeighedKeys * value_width_ / 2));
    scores_ = take(kWeighedKeys * kPanelColumns);
    weights_ = reinterpret_cast<uint32_t*>(take(kWeighedKeys / 2 * kPanelColumns));
    accumulated_ = take(kTilePrefillRows * value_width_);
    finished_ = take(kPanelColumns * value_width_);
    for (int64_t p = 0; p < panels_; ++p) {
      begin_rows(call, work, p * kPanelColumns, panel_rows(p), kPanelColumns, rows_[p]);
      untouched_[p] = true;
      pack_query(p);
    }
    // Whole tiles of keys lie in a block, from whatever key on the work begins.
    in_place_ = call.block_size >= kTileRows && call.key.dim == 1 && call.head_dim % kTileElements == 0;
  }

  void run() {
    const int64_t begin = in_place_ ? work_.key_begin / kTileRows * kTileRows : work_.key_begin;
    for (int64_t first = begin; first < work_.key_end; first += kWeighedKeys)
      attend(first, min(kWeighedKeys, work_.key_end - first));
  }

  void finish(float* partials) {
    for (int64_t p = 0; p < panels_; ++p) {
      if (untouched_[p]) clear(p);
      const float* const from = accumulated_of(p);
      for (int64_t d = 0; d < value_width_; d += kLanes)
        for (int64_t r = 0; r < kPanelColumns; r += kLanes) {
          Vec block[kLanes];
          for (int i = 0; i < kLanes; ++i) block[i] = load(from + (d + i) * kPanelColumns + r);
          transpose(block);
          for (int i = 0; i < kLanes; ++i) store(finished_ + (r + i) * value_width_ + d, block[i]);
        }
      end_rows<BFloat16>(call_, work_, p * kPanelColumns, panel_rows(p), rows_[p], finished_, partials);
    }
  }

 private:
  int64_t panel_rows(int64_t p) const { return min(kPanelColumns, count_ - p * kPanelColumns); }
  int wide(int64_t p) const { return panel_rows(p) > kTileRows ? 2 : 1; }
  uint32_t* query_of(int64_t p) const { return query_ + p * kPanelColumns * key_width_ / 2; }
  float* accumulated_of(int64_t p) const { return accumulated_ + p * kPanelColumns * value_width_; }

  void clear(int64_t p) { std::memset(accumulated_of(p), 0, kPanelColumns * value_width_ * sizeof(float)); }

  void pack_query(int64_t p) {
    for (int64_t column = 0; column < wide(p) * kTileRows; column += kTileRows) {
      const BFloat16* rows[kTileRows];
      const int64_t first = p * kPanelColumns + column, some = min(kTileRows, count_ - first);
      for (int64_t r = 0; r < some; ++r) rows[r] = query_row<BFloat16>(call_, work_, first + r);
      for (int64_t d = 0; d < call_.head_dim; d += kTileElements)
        pack_columns(rows, some, d, call_.head_dim - d, query_of(p) + d / 2 * kPanelColumns + column);
    }
  }

  // Finds keys [first, first + n), or packs them, zero past head_dim.
  void find_keys(int64_t first, int64_t n) {
    find_rows(call_, work_, call_.key_cache, call_.key, first, n, cached_);
    for (int64_t k = 0; k < n; k += kTileRows)
      key_tiles_[k / kTileRows] = in_place_ ? cached_[k] : keys_ + k * key_width_;
    if (in_place_) return;
    std::memset(static_cast<void*>(keys_), 0, n * key_width_ * sizeof(BFloat16));
    for (int64_t k = 0; k < n; ++k) {
      BFloat16* const to = keys_ + k * key_width_;
      if (call_.key.dim == 1)
        std::memcpy(static_cast<void*>(to), cached_[k], call_.head_dim * sizeof(BFloat16));
      else
        for (int64_t d = 0; d < call_.head_dim; ++d) to[d] = cached_[k][d * call_.key.dim];
    }
  }

  // A block of values [the even, then the odd elements][key] from element d on, zero for keys outside [begin, end);
  // tells which elements are not finite.
  template <bool whole>
  __mmask32 turn_block(int64_t key, int64_t d, int64_t begin, int64_t end, BFloat16* to) const {
    const int64_t size = call_.v_head_dim - d;
    const __mmask32 some = size >= kChunk ? ~0u : (1u << size) - 1;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    const auto row = [&](int64_t k) PAGED_INLINED {
      const bool used = whole || (k >= begin && k < end);
      const __m512i elements = whole ? _mm512_loadu_si512(cached_[k] + d)
                                     : _mm512_maskz_loadu_epi16(used ? some : 0, cached_[used ? k : 0] + d);
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(elements, exponent), exponent);
      return (BitVec)elements;
    };
    Vec even[kLanes], odd[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const Chunk pairs = pair_rows(row(key + 2 * i), row(key + 2 * i + 1));
      even[i] = pairs.first;
      odd[i] = pairs.second;
    }
    transpose(even);
    transpose(odd);
    for (int i = 0; i < kLanes; ++i) {
      store_as(to + i * kTileElements, even[i]);
      store_as(to + (kLanes + i) * kTileElements, odd[i]);
    }
    return bad;
  }

  // values [chunk of elements][32 keys] of blocks; tells whether all are finite.
  bool turn_values(int64_t n, int64_t begin, int64_t end) {
    __mmask32 bad = 0;
    for (int64_t k = 0; k < n; k += kTileElements)
      for (int64_t d = 0; d < call_.v_head_dim; d += kChunk) {
        BFloat16* const to = values_ + d * kWeighedKeys + k * kChunk;
        const bool whole = k >= begin && k + kTileElements <= end && call_.v_head_dim - d >= kChunk;
        bad |= whole ? turn_block<true>(k, d, begin, end, to) : turn_block<false>(k, d, begin, end, to);
      }
    return bad == 0;
  }

  PanelKeys panel_keys(const Rows& panel, int64_t first, int64_t n) const {
    PanelKeys keys;
    keys.begin = max(panel.some_begin - first, 0) / kTileElements * kTileElements;
    keys.end = max(min(panel.some_end - first, n), keys.begin);
    const auto within = [&](int64_t key, int64_t least) { return min(max(key - first, least), keys.end); };
    keys.visible_begin = within(max(panel.every_begin, work_.key_begin), keys.begin);
    keys.visible_end = within(panel.every_end, keys.visible_begin);
    return keys;
  }

  void score(int64_t p, const PanelKeys& keys) {
    for (int64_t k = keys.begin; k < keys.end; k += 2 * kTileRows) {
      const int tall = keys.end - k > kTileRows ? 2 : 1;
      const LeftFactor left = {{key_tiles_[k / kTileRows], key_tiles_[k / kTileRows + tall - 1]},
                               (in_place_ ? call_.key.token : key_width_) * int64_t(sizeof(BFloat16)),
                               kRowBytes};
      add_tiles(tall, wide(p), left, {query_of(p)}, key_width_ / kTileElements, scores_ + k * kPanelColumns,
                kPanelColumns, true, [](int64_t) {});
    }
  }

  // sums [kChunk elements][row] of weighted values from element d on
  void add_values(int64_t p, const PanelKeys& keys, int64_t d, float* sums, bool first) {
    const BFloat16* const tiles = values_ + d * kWeighedKeys + keys.begin * kChunk;
    const LeftFactor left = {{tiles, tiles + kTileRows * kTileElements}, kRowBytes, 2 * kTileBytes};
    add_tiles(2, wide(p), left, {weights_ + keys.begin / 2 * kPanelColumns}, keys.steps(), sums, kPanelColumns, first,
              [](int64_t) {});
  }

  // A value that a row does not see must not be multiplied by its weight of 0, as it may be NaN.
  void add_values_row_by_row(int64_t p, const PanelKeys& keys, int64_t first, int64_t n) {
    const Rows& panel = rows_[p];
    if (untouched_[p]) clear(p);
    for (int64_t row = 0, next; row < panel_rows(p); row = next) {
      for (next = row + 1; next < panel_rows(p); ++next)
        if (panel.begin[next] != panel.begin[row] || panel.end[next] != panel.end[row]) break;
      turn_values(n, max(max(panel.begin[row], work_.key_begin) - first, 0), min(panel.end[row] - first, n));
      for (int64_t d = 0; d < value_width_; d += kChunk) {
        // In the same order as all rows together, so that the sums of a row are the same to the last bit.
        float* const sums = accumulated_of(p) + d * kPanelColumns;
        std::memcpy(scores_, sums, kChunk * kPanelColumns * sizeof(float));
        add_values(p, keys, d, scores_, false);
        for (int64_t e = 0; e < kChunk; ++e)
          std::memcpy(sums + e * kPanelColumns + row, scores_ + e * kPanelColumns + row, (next - row) * sizeof(float));
      }
    }
    turn_values(n, max(work_.key_begin - first, 0), n);
  }

  // Brings a share of the next keys and values from memory into the second-level cache.
  void fetch(int64_t first, int64_t share) {
    const int64_t begin = first + share * (kWeighedKeys / kPanels),
                  end = min(begin + kWeighedKeys / kPanels, work_.key_end);
    if (begin >= end) return;
    const BFloat16* rows[kWeighedKeys / kPanels];
    const auto fetch_rows = [&](const void* cache, const CacheStrides& strides, int64_t size) {
      find_rows(call_, work_, cache, strides, begin, end - begin, rows);
      for (int64_t k = 0; k < end - begin; ++k)
        for (int64_t d = 0; d < size; d += kChunk) __builtin_prefetch(rows[k] + d, 0, 2);
    };
    if (call_.key.dim == 1) fetch_rows(call_.key_cache, call_.key, call_.head_dim);
    fetch_rows(call_.value_cache, call_.value, call_.v_head_dim);
  }

  void attend(int64_t first, int64_t n) {
    find_keys(first, n);
    find_rows(call_, work_, call_.value_cache, call_.value, first, n, cached_);
    const bool all_finite = turn_values(n, max(work_.key_begin - first, 0), n);
    const Scoring how = scoring(call_, work_);
    for (int64_t p = 0; p < kPanels; ++p) {
      fetch(first + kWeighedKeys, p);
      if (p >= panels_) continue;
      Rows& panel = rows_[p];
      const PanelKeys keys = panel_keys(panel, first, n);
      if (keys.begin >= keys.end) continue;
      score(p, keys);
      if (weigh_keys(panel, wide(p), how, scores_, first, work_.key_begin, keys, weights_) && !untouched_[p])
        correct_rows(panel, wide(p), value_width_, accumulated_of(p));
      if (all_finite || (keys.all_visible() && (keys.end == n || keys.end % kTileElements == 0)))
        for (int64_t d = 0; d < value_width_; d += kChunk)
          add_values(p, keys, d, accumulated_of(p) + d * kPanelColumns, untouched_[p]);
      else
        add_values_row_by_row(p, keys, first, n);
      untouched_[p] = false;
    }
  }

  const AttentionCall& call_;
  const AttentionWork& work_;
  const int64_t count_, panels_, key_width_, value_width_;
  uint32_t *query_, *weights_;
  BFloat16 *keys_, *values_;
  float *scores_, *accumulated_, *finished_;
  bool in_place_;
  Rows rows_[kPanels];
  bool untouched_[kPanels];  // nothing was accumulated yet
  const BFloat16* cached_[kWeighedKeys];
  const BFloat16* key_tiles_[kWeighedKeys / kTileRows];
};

}  // namespace

void attention_prefill_bfloat16(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials) {
  TilePrefill state(call, work, scratch);
  with_tiles([&] { state.run(); });
  state.finish(partials);
}

}  // namespace paged::PAGED_ISA
