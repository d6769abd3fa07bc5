// Rotates queries and keys on the way to where they are kept, in float32, or float64 for float64.
#include "../rope_and_cache.h"

#include "row_types.h"

// Each product is rounded before the sum: then every instruction set gives the bits that torch gives in float32.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace paged::PAGED_ISA {

cpu::StoreTokens store_tokens;

namespace {

template <int... lane>
PAGED_INLINE Vec pick(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, IntVec{lane...});
#endif
}
template <int... lane>
PAGED_INLINE Chunk even_and_odd(Chunk c, std::integer_sequence<int, lane...>) {
  return {pick(c.first, c.second, std::integer_sequence<int, 2 * lane...>{}),
          pick(c.first, c.second, std::integer_sequence<int, 2 * lane + 1 ...>{})};
}
template <int... lane>
PAGED_INLINE Vec swap_neighbours(Vec v, std::integer_sequence<int, lane...>) {
  return pick(v, v, std::integer_sequence<int, (lane ^ 1)...>{});
}
constexpr auto kEachLane = std::make_integer_sequence<int, kLanes>{};

// In place of each element the other one of its interleaved pair.
template <class T>
PAGED_INLINE Chunk partners(Chunk c) {
  if constexpr (std::is_same_v<T, BFloat16>) return {c.second, c.first};
  return {swap_neighbours(c.first, kEachLane), swap_neighbours(c.second, kEachLane)};
}

PAGED_INLINE Chunk negative(Chunk c) { return {-c.first, -c.second}; }

// Negative at the first element of each interleaved pair.
template <class T>
PAGED_INLINE Chunk alternating(Chunk c) {
  if constexpr (std::is_same_v<T, BFloat16>) return {-c.first, c.second};
  const IntVec first = (lane_numbers() & 1) == 0;
  return {select(first, -c.first, c.first), select(first, -c.second, c.second)};
}

// One token's cos and sin in float32, ordered like the chunks of T that they turn; converted once for all its heads.
template <class T>
struct Turn {
  float cos[cpu::kMaxRotaryDim], sin[cpu::kMaxRotaryDim];

  template <class Angle, class Sign>
  Turn(const Angle* cos_row, const Angle* sin_row, int64_t count, const Sign& signed_sine) {
    for (int64_t d = 0; d < count; d += kChunk) {
      store_chunk(cos + d, in_order(cos_row + d, count - d));
      store_chunk(sin + d, signed_sine(in_order(sin_row + d, count - d)));
    }
  }

  template <class Angle>
  static Chunk in_order(const Angle* from, int64_t count) {
    const Chunk c = load_chunk(from, count);
    constexpr bool reorder = std::is_same_v<T, BFloat16> && std::is_same_v<Angle, float>;
    return reorder ? even_and_odd(c, kEachLane) : c;
  }

  Chunk operator()(Chunk x, Chunk partner, int64_t d) const {
    const Chunk c = load_chunk(cos + d), s = load_chunk(sin + d);
    return {x.first * c.first + partner.first * s.first, x.second * c.second + partner.second * s.second};
  }
};

// One head of a token: dense elements to read and elements at a stride to write, divided by the factor if it has one.
template <class T>
struct Head {
  const T* from;
  T* to;
  int64_t stride;
  const float* factor;

  PAGED_INLINED void put(int64_t d, Chunk c, int64_t count) const {
    if (factor) c = {c.first / *factor, c.second / *factor};
    scatter_chunk(to + d * stride, c, count, stride);
  }
  void put(int64_t d, double x) const { to[d * stride] = factor ? x / *factor : x; }
};

// Calls `f` with each head of the query, and of the key if the token has a slot.
template <class T, class F>
PAGED_INLINE void each_head(const RopeWrite& write, int64_t token, int64_t slot, const F& f) {
  const CacheWrite& key = write.key;
  const T* query = reinterpret_cast<const T*>(write.query.data) + token * write.query.token_stride;
  T* rotated = reinterpret_cast<T*>(write.rotated) + token * write.num_heads * key.head_dim;
  for (int64_t head = 0; head < write.num_heads; ++head)
    f(Head<T>{query + head * write.query.head_stride, rotated + head * key.head_dim, 1, nullptr});
  if (slot < 0) return;
  const T* row = reinterpret_cast<const T*>(key.rows.data) + token * key.rows.token_stride;
  T* place = reinterpret_cast<T*>(key.cache.data) + slot / key.block_size * key.cache.block_stride +
             slot % key.block_size * key.cache.token_stride;
  for (int64_t head = 0; head < key.num_kv_heads; ++head)
    f(Head<T>{row + head * key.rows.head_stride, place + head * key.cache.head_stride, key.cache.dim_stride,
              factor_of(key.scale, head)});
}

// Calls `f(d, count)` for the elements [d, d + count) of each chunk of a row; only the last may be less than kChunk.
template <class F>
PAGED_INLINE void each_chunk(int64_t size, const F& f) {
  int64_t d = 0;
  for (; d + kChunk <= size; d += kChunk) f(d, int64_t(kChunk));
  if (d < size) f(d, size - d);
}

template <class T, class Angle, class EachHead>
void rotate_halves(const Angle* cos, const Angle* sin, int64_t half, const EachHead& each) {
  const Turn<T> lower(cos, sin, half, [](Chunk c) { return negative(c); });
  const Turn<T> upper(cos + half, sin + half, half, [](Chunk c) { return c; });
  each([&](const Head<T>& head) PAGED_INLINED {
    each_chunk(half, [&](int64_t d, int64_t count) PAGED_INLINED {
      const Chunk x = load_chunk(head.from + d, count), y = load_chunk(head.from + half + d, count);
      head.put(d, lower(x, y, d), count);
      head.put(half + d, upper(y, x, d), count);
    });
  });
}

template <class T, class Angle, class EachHead>
void rotate_neighbours(const Angle* cos, const Angle* sin, int64_t rotary_dim, const EachHead& each) {
  const Turn<T> turn(cos, sin, rotary_dim, [](Chunk c) { return alternating<T>(c); });
  each([&](const Head<T>& head) PAGED_INLINED {
    each_chunk(rotary_dim, [&](int64_t d, int64_t count) PAGED_INLINED {
      const Chunk x = load_chunk(head.from + d, count);
      head.put(d, turn(x, partners<T>(x), d), count);
    });
  });
}

// `to_partner` is the distance from the first to the second element of a pair, `to_next` that from pair to pair.
template <class Angle, class EachHead>
void rotate_float64(const Angle* cos, const Angle* sin, int64_t num_pairs, int64_t to_partner, int64_t to_next,
                    const EachHead& each) {
  each([&](const Head<double>& head) PAGED_INLINED {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      const int64_t i = pair * to_next, j = i + to_partner;
      const double x = head.from[i], y = head.from[j];
      head.put(i, x * cos[i] - y * sin[i]);
      head.put(j, y * cos[j] + x * sin[j]);
    }
  });
}

template <class T, class Angle>
void rotate_token(const RopeWrite& write, int64_t token, int64_t slot) {
  const Angles& angles = write.angles;
  const Angle* cos = reinterpret_cast<const Angle*>(angles.cos) + token * angles.cos_stride;
  const Angle* sin = reinterpret_cast<const Angle*>(angles.sin) + token * angles.sin_stride;
  const int64_t rotary_dim = angles.rotary_dim, half = rotary_dim / 2, unrotated = write.key.head_dim - rotary_dim;
  const auto each = [&](const auto& rotate) PAGED_INLINED {
    each_head<T>(write, token, slot, [&](const Head<T>& head) PAGED_INLINED {
      rotate(head);
      if (unrotated)
        move_row<true>(head.from + rotary_dim, 1, head.to + rotary_dim * head.stride, head.stride, unrotated,
                       head.factor);
    });
  };
  if constexpr (std::is_same_v<T, double>) {
    rotate_float64(cos, sin, half, angles.interleaved ? 1 : half, angles.interleaved ? 2 : 1, each);
  } else if (angles.interleaved) {
    rotate_neighbours<T>(cos, sin, rotary_dim, each);
  } else {
    rotate_halves<T>(cos, sin, half, each);
  }
}

}  // namespace

void rotate_tokens(const RopeWrite& write, const int64_t* slot_mapping, int64_t begin, int64_t end) {
  with_type(write.key.element, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (is_number<T>) {
      const bool float32_angles = write.angles.element == Element::kFloat32;
      for (int64_t token = begin; token < end; ++token)
        float32_angles ? rotate_token<T, float>(write, token, slot_mapping[token])
                       : rotate_token<T, T>(write, token, slot_mapping[token]);
    }
  });
  store_tokens(write.value, slot_mapping, begin, end, false);
}

}  // namespace paged::PAGED_ISA
