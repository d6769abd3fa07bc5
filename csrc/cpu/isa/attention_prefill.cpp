// Attention of many query rows that share a KV head: tiles of K and V are packed once and used by all rows.
#include "attention_rows.h"
#include "cached_rows.h"
#include "products.h"

namespace paged::PAGED_ISA {
namespace {

// Rows lie in panels of kChunk lanes: packed query [panel][head_dim][lane], scores and weights [panel][key][lane].
constexpr int kPanels = kPrefillRows / kChunk;
static_assert(kPrefillRows % kChunk == 0 && kTileKeys % kBlock == 0 && kChunk % kBlock == 0);

// How the factors of both products are packed: as floats.
template <class T>
struct Floats : FloatFactors {
  static void pack_query(const T* row, int64_t size, float* to, int64_t stride) {
    for (int64_t d = 0; d < size; d += kChunk) {
      float chunk[kChunk];
      store_chunk(chunk, load_chunk(row + d, size - d));
      for (int i = 0; i < kChunk; ++i) to[(d + i) * stride] = chunk[i];
    }
  }
  static void pack_key(const T* row, int64_t size, int64_t stride, float* to) {
    for (int64_t d = 0; d < size; d += kChunk) store_chunk(to + d, gather_chunk(row, d, size, stride));
  }
  // The factors of one key for kChunk elements of its value.
  PAGED_INLINE void pack_values(const Chunk* values, float* to) { store_chunk(to, values[0]); }
  PAGED_INLINE const float* pack_weights(float* weights, int64_t, float*) { return weights; }
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16; the weights are rounded to bfloat16 too.
struct BFloat16Pairs : BFloat16Factors {
  static void pack_query(const BFloat16* row, int64_t size, uint32_t* to, int64_t stride) {
    for (int64_t d = 0; d < size / 2; ++d) std::memcpy(to + d * stride, row + 2 * d, sizeof(uint32_t));
  }
  static void pack_key(const BFloat16* row, int64_t size, int64_t stride, uint32_t* to) {
    if (stride == 1) {
      std::memcpy(to, row, size * sizeof(BFloat16));
    } else {
      auto* bytes = reinterpret_cast<char*>(to);
      for (int64_t d = 0; d < size; ++d) std::memcpy(bytes + d * sizeof(BFloat16), row + d * stride, sizeof(BFloat16));
    }
  }
  PAGED_INLINE void pack_values(const Chunk* values, uint32_t* to) {
    store_as(to, bfloat16_pairs(values[0].first, values[1].first));
    store_as(to + kLanes, bfloat16_pairs(values[0].second, values[1].second));
  }
  PAGED_INLINE const uint32_t* pack_weights(float* weights, int64_t keys, float* room) {
    auto* pairs = reinterpret_cast<uint32_t*>(room);
    for (int64_t k = 0; k < keys; k += 2)
      for (int lane = 0; lane < kChunk; lane += kLanes)
        store_as(pairs + k / 2 * kChunk + lane,
                 bfloat16_pairs(load(weights + k * kChunk + lane), load(weights + (k + 1) * kChunk + lane)));
    return pairs;
  }
};
#else
using BFloat16Pairs = Floats<BFloat16>;
#endif

// One piece of work, with what it keeps packed in the scratch memory.
template <class T, class Factors>
struct Prefill {
  using Factor = typename Factors::Factor;
  const AttentionCall& call;
  const AttentionWork& work;
  const int64_t count, panels, query_terms, value_width;
  Factor *query, *keys, *values;
  float *scores, *weight_room, *accumulated;
  Rows rows[kPanels];
  const T* cached[kTileKeys];

  Prefill(const AttentionCall& call, const AttentionWork& work, float* scratch)
      : call(call),
        work(work),
        count(rows_of(work)),
        panels((count + kChunk - 1) / kChunk),
        query_terms(padded(call.head_dim) / Factors::kTerms),
        value_width(padded(call.v_head_dim)) {
    const auto take = [&](int64_t floats) {
      float* taken = scratch;
      scratch += floats;
      return taken;
    };
    const int64_t key_width = padded(call.head_dim);
    query = reinterpret_cast<Factor*>(take(kPrefillRows * key_width));
    keys = reinterpret_cast<Factor*>(take(kTileKeys * key_width));
    values = reinterpret_cast<Factor*>(take(kTileKeys * value_width));
    scores = take(kPrefillRows * kTileKeys);
    weight_room = take(kPrefillRows * kTileKeys);
    accumulated = take(kPrefillRows * value_width);
    std::memset(accumulated, 0, panels * kChunk * value_width * sizeof(float));
    std::memset(query, 0, panels * kChunk * query_terms * sizeof(Factor));
    std::memset(keys, 0, kTileKeys * query_terms * sizeof(Factor));
    for (int64_t r = 0; r < count; ++r)
      Factors::pack_query(query_row<T>(call, work, r), call.head_dim,
                          query + r / kChunk * kChunk * query_terms + r % kChunk, kChunk);
    for (int64_t p = 0; p < panels; ++p)
      begin_rows(call, work, p * kChunk, min(kChunk, count - p * kChunk), kChunk, rows[p]);
  }

  void pack_keys(int64_t first, int64_t n) {
    find_rows(call, work, call.key_cache, call.key, first, n, cached);
    for (int64_t k = 0; k < n; ++k) Factors::pack_key(cached[k], call.head_dim, call.key.dim, keys + k * query_terms);
  }

  // values [chunk][key][lane], zero for keys outside [begin, end); tells whether one of them is not finite.
  bool pack_values(int64_t n, int64_t begin, int64_t end) {
    IntVec bad = {};
    for (int64_t k = 0; k < n; k += Factors::kTerms)
      for (int64_t d = 0; d < call.v_head_dim; d += kChunk) {
        Chunk parts[Factors::kTerms] = {};
        for (int64_t t = 0; t < Factors::kTerms; ++t)
          if (k + t >= begin && k + t < end) {
            parts[t] = load_chunk(cached[k + t] + d, call.v_head_dim - d);
            bad |= not_finite(parts[t].first) | not_finite(parts[t].second);
          }
        Factors::pack_values(parts, values + (d * kTileKeys + k * kChunk) / Factors::kTerms);
      }
    return any(bad);
  }

  void score(int64_t p, int64_t first, int64_t n) {
    const Rows& panel = rows[p];
    for (int64_t k = 0; k < n; k += kBlock) {
      if (first + k >= panel.some_end || first + k + kBlock <= panel.some_begin) continue;
      Vec product[2 * kBlock];
      multiply<Factors, kBlock, 2>(keys + k * query_terms, query_terms, 1, query + p * kChunk * query_terms,
                                   query_terms, product, [](int64_t) {});
      for (int i = 0; i < 2 * kBlock; ++i) store(scores + (p * kTileKeys + k) * kChunk + i * kLanes, product[i]);
    }
  }

  // Adds the weighted values to rows [begin, end) of a block of rows of a panel.
  void accumulate(int64_t p, int64_t block, int64_t begin, int64_t end, const Factor* weights, int64_t first,
                  int64_t n) {
    const Rows& panel = rows[p];
    int64_t from = n, to = 0;
    for (int64_t r = block + begin; r < block + end; ++r) {
      from = min(from, max(panel.begin[r] - first, 0));
      to = max(to, min(panel.end[r] - first, n));
    }
    from = from / Factors::kTerms;
    to = (to + Factors::kTerms - 1) / Factors::kTerms;
    if (from >= to) return;
    for (int64_t d = 0; d < call.v_head_dim; d += kChunk) {
      Vec product[2 * kBlock];
      multiply<Factors, kBlock, 2>(weights + from * kChunk + block, 1, kChunk,
                                   values + d * kTileKeys / Factors::kTerms + from * kChunk, to - from, product,
                                   [](int64_t) {});
      for (int64_t i = begin; i < end; ++i) {
        float* row = accumulated + (p * kChunk + block + i) * value_width + d;
        const Chunk before = load_chunk(row);
        const float correction = panel.correction[block + i];
        store_chunk(row,
                    Chunk{before.first * correction + product[2 * i], before.second * correction + product[2 * i + 1]});
      }
    }
  }

  void tile(int64_t first, int64_t n) {
    pack_keys(first, n);
    find_rows(call, work, call.value_cache, call.value, first, n, cached);
    const bool all_finite = !pack_values(n, 0, n);
    const Scoring how = scoring(call, work);
    for (int64_t p = 0; p < panels; ++p) {
      Rows& panel = rows[p];
      if (first >= panel.some_end || first + n <= panel.some_begin) continue;
      float* weights = scores + p * kTileKeys * kChunk;
      score(p, first, n);
      online_softmax(panel, how, weights, first, n);
      if (n % Factors::kTerms) std::memset(weights + n * kChunk, 0, kChunk * sizeof(float));
      const Factor* factors = Factors::pack_weights(weights, n, weight_room);
      const int64_t count_here = min(kChunk, count - p * kChunk);
      if (all_finite || (first >= panel.every_begin && first + n <= panel.every_end)) {
        for (int64_t block = 0; block < count_here; block += kBlock) accumulate(p, block, 0, kBlock, factors, first, n);
        continue;
      }
      // A value that a row does not see must not be multiplied by its weight of 0, as it may be NaN.
      for (int64_t r = 0; r < count_here; ++r) {
        pack_values(n, panel.begin[r] - first, panel.end[r] - first);
        accumulate(p, r / kBlock * kBlock, r % kBlock, r % kBlock + 1, factors, first, n);
      }
      pack_values(n, 0, n);
    }
  }
};

template <class T, class Factors>
void prefill(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials) {
  Prefill<T, Factors> state(call, work, scratch);
  for (int64_t first = work.key_begin; first < work.key_end; first += kTileKeys)
    state.tile(first, min(kTileKeys, work.key_end - first));
  for (int64_t p = 0; p < state.panels; ++p)
    end_rows<T>(call, work, p * kChunk, min(kChunk, state.count - p * kChunk), state.rows[p],
                state.accumulated + p * kChunk * state.value_width, partials);
}

}  // namespace

void attention_prefill_float32(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials) {
  prefill<float, Floats<float>>(call, work, scratch, partials);
}
void attention_prefill_bfloat16(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials) {
  prefill<BFloat16, BFloat16Pairs>(call, work, scratch, partials);
}
void attention_prefill_float16(const AttentionCall& call, const AttentionWork& work, float* scratch, float* partials) {
  prefill<Float16, Floats<Float16>>(call, work, scratch, partials);
}

}  // namespace paged::PAGED_ISA
