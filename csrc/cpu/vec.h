// Vectors of floats as wide as the instruction set has them, with loads from and stores to every storage type.
//
// Included only by files that are compiled once per instruction set (-DPAGED_ISA=name). Everything has internal
// linkage, and nothing from the standard library is instantiated, so that no code for one instruction set can be
// linked into another. Lanes are little-endian.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// A quarter of a second a file: only where there are too many intrinsics to name the compiler's own.
#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PAGED_INLINE static inline __attribute__((always_inline))
// For members and lambdas.
#define PAGED_INLINED __attribute__((always_inline))

namespace paged::PAGED_ISA {
namespace {

// Calls `run` with 0, 1, ..., count - 1 as compile-time constants, so that arrays it indexes by them stay in registers.
template <class Run, int... i>
PAGED_INLINE void unrolled(const Run& run, std::integer_sequence<int, i...>) {
  (run(std::integral_constant<int, i>{}), ...);
}
template <int count, class Run>
PAGED_INLINE void unrolled(const Run& run) {
  unrolled(run, std::make_integer_sequence<int, count>{});
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));

// Storage types: bits only, arithmetic is float's.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class V>
PAGED_INLINE V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
PAGED_INLINE void store_as(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
PAGED_INLINE Vec load(const float* from) { return load_as<Vec>(from); }

// The first half of the vector from a, the second from b.
template <int bytes>
struct Shorts {
  typedef uint16_t Vector __attribute__((vector_size(bytes)));
};
template <class V, int... part>
PAGED_INLINE V join(const void* a, const void* b, std::integer_sequence<int, part...>) {
  using Half = typename Shorts<sizeof(V) / 2>::Vector;
  return (V)__builtin_shufflevector(load_as<Half>(a), load_as<Half>(b), part...);
}
template <class V>
PAGED_INLINE V join(const void* a, const void* b) {
#if defined(__AVX512F__)
  // With its operand in memory the instruction is no shuffle; the compiler's own choice is one.
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_inserti64x4(_mm512_castsi256_si512(load_as<__m256i>(a)), load_as<__m256i>(b), 1);
#endif
  return join<V>(a, b, std::make_integer_sequence<int, sizeof(V) / 2>{});
}
PAGED_INLINE void store(float* to, Vec v) { store_as(to, v); }
PAGED_INLINE Vec splat(float x) { return x - Vec{}; }
PAGED_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

template <class Mask, class V>
PAGED_INLINE V select(Mask mask, V yes, V no) {
  return mask ? yes : no;
}
PAGED_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }

template <int... lane>
PAGED_INLINE IntVec lane_numbers(std::integer_sequence<int, lane...>) {
  return IntVec{lane...};
}
PAGED_INLINE IntVec lane_numbers() { return lane_numbers(std::make_integer_sequence<int, kLanes>{}); }

#if defined(__AVX512F__)
PAGED_INLINE Vec widen(ShortVec halves) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves); }
PAGED_INLINE void narrow(Float16* to, Vec v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));
}
#elif defined(__F16C__)
typedef short Halves __attribute__((vector_size(16)));
PAGED_INLINE Vec widen(ShortVec halves) { return (Vec)__builtin_ia32_vcvtph2ps256((Halves)halves); }
PAGED_INLINE void narrow(Float16* to, Vec v) { store_as(to, __builtin_ia32_vcvtps2ph256(v, 0)); }
#elif defined(__aarch64__)
PAGED_INLINE Vec widen(ShortVec halves) { return (Vec)vcvt_f32_f16((float16x4_t)halves); }
PAGED_INLINE void narrow(Float16* to, Vec v) { vst1_f16((__fp16*)to, vcvt_f16_f32((float32x4_t)v)); }
#else
PAGED_INLINE Vec widen(ShortVec halves) {
  const BitVec half = __builtin_convertvector(halves, BitVec);
  // Exponent and mantissa in place, the bias put right by a multiplication, which normalises denormals too.
  const Vec magnitude = (Vec)((half & 0x7fff) << 13) * splat(0x1p112f);
  const BitVec infinite = (BitVec)(magnitude >= splat(65536.0f)) & 0x7f800000;
  return (Vec)((BitVec)magnitude | infinite | (half & 0x8000) << 16);
}
PAGED_INLINE void narrow(Float16* to, Vec v) {
  const BitVec bits = (BitVec)v & 0x7fffffff, sign = (BitVec)v >> 16 & 0x8000;
  const BitVec normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  // Adding 0.5 aligns a denormal's last bit with float's and rounds to nearest even.
  const BitVec denormal = (BitVec)((Vec)bits + splat(0.5f)) - 0x3f000000;
  const BitVec special = select(bits > 0x7f800000, BitVec{} + 0x7e00, BitVec{} + 0x7c00);
  const BitVec half = select(bits < 0x38800000, denormal, select(bits >= 0x47800000, special, normal));
  store_as(to, __builtin_convertvector(half | sign, ShortVec));
}
#endif

PAGED_INLINE Vec widen(const Float16* from) { return widen(load_as<ShortVec>(from)); }

PAGED_INLINE float to_float(float x) { return x; }
PAGED_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load_as<float>(&bits);
}
PAGED_INLINE float to_float(Float16 x) {
  const Float16 lanes[kLanes] = {x};
  return widen(lanes)[0];
}

// A chunk is 2 * kLanes elements of a row in two vectors. For bfloat16 they are the even and the odd elements: a shift
// and a mask instead of two widening shuffles. Sums over a row do not care, and `store_chunk` undoes the order.
constexpr int kChunk = 2 * kLanes;

struct Chunk {
  Vec first, second;
};

PAGED_INLINE Chunk load_chunk(const float* from) { return {load(from), load(from + kLanes)}; }
PAGED_INLINE Chunk load_chunk(const Float16* from) { return {widen(from), widen(from + kLanes)}; }
PAGED_INLINE Chunk split(BitVec pairs) { return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000)}; }
PAGED_INLINE Chunk load_chunk(const BFloat16* from) { return split(load_as<BitVec>(from)); }

// A lane has an element of each of two rows of bfloat16, of the even, then of the odd elements.
PAGED_INLINE Chunk pair_rows(BitVec first, BitVec second) {
  return {(Vec)((first & 0xffff) | second << 16), (Vec)(first >> 16 | (second & 0xffff0000))};
}

// kLanes elements of two rows: each vector holds elements of a in its first half, the same ones of b in its second.
PAGED_INLINE Chunk load_halves(const float* a, const float* b) {
  return {join<Vec>(a, b), join<Vec>(a + kLanes / 2, b + kLanes / 2)};
}
PAGED_INLINE Chunk load_halves(const Float16* a, const Float16* b) {
  return {widen(join<ShortVec>(a, b)), widen(join<ShortVec>(a + kLanes / 2, b + kLanes / 2))};
}
PAGED_INLINE Chunk load_halves(const BFloat16* a, const BFloat16* b) { return split(join<BitVec>(a, b)); }

// The upper half of each lane is the bfloat16 nearest to the float.
PAGED_INLINE BitVec round_to_bfloat16(Vec v) {
  const BitVec bits = (BitVec)v;
  return select(v == v, bits + 0x7fff + (bits >> 16 & 1), bits | 0x400000);
}
PAGED_INLINE BitVec bfloat16_pairs(Vec low, Vec high) {
  return round_to_bfloat16(low) >> 16 | (round_to_bfloat16(high) & 0xffff0000);
}

PAGED_INLINE void narrow(float* to, Vec v) { store(to, v); }
PAGED_INLINE void narrow(BFloat16* to, Vec v) {
  store_as(to, __builtin_convertvector(round_to_bfloat16(v) >> 16, ShortVec));
}

// The first `count` lanes.
template <class T>
PAGED_INLINE void narrow(T* to, Vec v, int64_t count) {
  if (count >= kLanes) return narrow(to, v);
  T some[kLanes];
  narrow(some, v);
  std::memcpy(static_cast<void*>(to), some, count * sizeof(T));
}

PAGED_INLINE void store_chunk(float* to, Chunk c) {
  store(to, c.first);
  store(to + kLanes, c.second);
}
PAGED_INLINE void store_chunk(Float16* to, Chunk c) {
  narrow(to, c.first);
  narrow(to + kLanes, c.second);
}
PAGED_INLINE void store_chunk(BFloat16* to, Chunk c) { store_as(to, bfloat16_pairs(c.first, c.second)); }

// `count` of a chunk's elements: the rest is read as zero and not written.
template <class T>
PAGED_INLINE Chunk load_chunk(const T* from, int64_t count) {
  if (count >= kChunk) return load_chunk(from);
  T padded[kChunk] = {};
#if defined(__AVX512BW__)
  // Under a mask, because a vector that is loaded from what smaller stores wrote just before has to wait for them.
  const uint64_t some = (1ull << count * sizeof(T) % 64) - 1, low = count * sizeof(T) < 64 ? some : ~0ull;
  store_as(padded, _mm512_maskz_loadu_epi8(low, from));
  if (count * sizeof(T) > 64) store_as(padded + 64 / sizeof(T), _mm512_maskz_loadu_epi8(some, from + 64 / sizeof(T)));
#else
  std::memcpy(padded, from, count * sizeof(T));
#endif
  return load_chunk(padded);
}
template <class T>
PAGED_INLINE void store_chunk(T* to, Chunk c, int64_t count) {
  if (count >= kChunk) return store_chunk(to, c);
  T padded[kChunk];
  store_chunk(padded, c);
  std::memcpy(to, padded, count * sizeof(T));
}

// Lane i of the result is lane `lane[i]` of a; lanes of b count from kLanes on.
template <int... lane>
PAGED_INLINE Vec pick(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, IntVec{lane...});
#endif
}

template <int stride, int... lane>
PAGED_INLINE Vec add_interleaved(Vec a, Vec b, std::integer_sequence<int, lane...>) {
  const Vec stay = pick<(lane & stride ? kLanes + lane : lane)...>(a, b);
  return stay + pick<(lane & stride ? lane - stride : kLanes + lane + stride)...>(b, a);
}

// Lanes of a whose number has the bit `stride` change places with the lanes of b `stride` before them.
template <int stride, int... lane>
PAGED_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
  const Vec low = pick<(lane & stride ? kLanes + lane - stride : lane)...>(a, b);
  b = pick<(lane & stride ? kLanes + lane : lane + stride)...>(a, b);
  a = low;
}

// Lane j of v[i] becomes lane i of v[j].
template <int stride = 1>
PAGED_INLINE void transpose(Vec* v) {
  if constexpr (stride < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & stride)) exchange<stride>(v[i], v[i + stride], std::make_integer_sequence<int, kLanes>{});
    transpose<stride * 2>(v);
  }
}

// Lane i of the result is the sum of v[i % (kLanes / parts)] over that one of its `parts` which lane i lies in.
template <int parts, int stride = 1>
PAGED_INLINE Vec sums(const Vec* v) {
  constexpr int count = kLanes / stride / parts;
  if constexpr (count == 1) {
    return v[0];
  } else {
    Vec added[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      added[i] = add_interleaved<stride>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
    return sums<parts, stride * 2>(added);
  }
}

// 2^x for x <= 0, exactly 0 below -126.5; NaN stays NaN. Relative error 1e-7 (Cephes exp2f).
PAGED_INLINE Vec exp2_nonpositive(Vec x) {
  x = select(x < splat(-127.0f), splat(-127.0f), x);
  const Vec magic = splat(0x1.8p23f);  // its last bit is worth 1: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (Vec)(((BitVec)shifted << 23) + (127u << 23));
}

// Relative error 3e-7: a Padé approximant for small x, where 1 - 2 / (e^2x + 1) cancels.
PAGED_INLINE Vec tanh(Vec x) {
  const Vec y = x * x;
  const Vec small =
      x * (135135.0f + y * (17325.0f + y * (378.0f + y))) / (135135.0f + y * (62370.0f + y * (3150.0f + 28.0f * y)));
  const Vec magnitude = select(x < 0.0f, -x, x);
  const Vec e = exp2_nonpositive(magnitude * -2.885390081777927f);  // e^(-2|x|)
  const Vec large = (1.0f - e) / (1.0f + e);
  return select(magnitude < 1.0f, small, select(x < 0.0f, -large, large));
}

}  // namespace
}  // namespace paged::PAGED_ISA
