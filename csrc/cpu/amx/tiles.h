// Products of matrices of bfloat16 by the tiles of Intel AMX, summed in float32.
#pragma once

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

// A tile has 16 rows of 64 bytes. A product takes 16 rows of 32 elements by 16 pairs of rows of 16 elements, pair by
// pair in a vector of dwords, and adds 16 rows of 16 floats.
constexpr int kTileRows = 16, kTileElements = 32;
constexpr int64_t kRowBytes = 64, kTileBytes = kTileRows * kRowBytes;

// Of the eight tiles. What is beyond a tile's rows and bytes is neither loaded nor stored.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int64_t num_rows, int64_t bytes) {
    rows[tile] = uint8_t(num_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

constexpr TileShapes whole_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kTileRows, kRowBytes);
  return shapes;
}

#if defined(PAGED_SOFTWARE_TILES)

// For the sanitizers, which see no memory that assembly touches, and for machines without the unit.
inline thread_local char software_tiles[8][kTileRows][kRowBytes];
inline thread_local TileShapes software_shapes;

template <class Run>
PAGED_INLINE void with_tiles(const TileShapes& shapes, const Run& run) {
  software_shapes = shapes;
  run();
}

template <int tile>
PAGED_INLINE void clear_tile() {
  std::memset(software_tiles[tile], 0, kTileBytes);
}
template <int tile>
PAGED_INLINE void load_tile(const void* from, int64_t stride) {
  clear_tile<tile>();
  for (int r = 0; r < software_shapes.rows[tile]; ++r)
    std::memcpy(software_tiles[tile][r], static_cast<const char*>(from) + r * stride, software_shapes.row_bytes[tile]);
}
template <int tile>
PAGED_INLINE void store_tile(void* to, int64_t stride) {
  for (int r = 0; r < software_shapes.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, software_tiles[tile][r], software_shapes.row_bytes[tile]);
}
template <int sum, int left, int right>
PAGED_INLINE void multiply_tiles() {
  for (int r = 0; r < kTileRows; ++r) {
    Vec total = load_as<Vec>(software_tiles[sum][r]);
    for (int pair = 0; pair < kTileRows; ++pair) {
      const Chunk elements = split(load_as<BitVec>(software_tiles[right][pair]));
      BFloat16 factors[2];
      std::memcpy(factors, software_tiles[left][r] + pair * sizeof factors, sizeof factors);
      total += elements.first * to_float(factors[0]);
      total += elements.second * to_float(factors[1]);
    }
    store_as(software_tiles[sum][r], total);
  }
}

#else

// Runs what uses tiles. With their registers in use, a switch of threads saves 8 KiB.
template <class Run>
PAGED_INLINE void with_tiles(const TileShapes& shapes, const Run& run) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  run();  // nothing in it throws
  asm volatile("tilerelease");
}

// Not the compiler's intrinsics: GCC 12 does not know that they read memory, and theirs take no template arguments.
template <int tile>
PAGED_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
PAGED_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
PAGED_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int left, int right>
PAGED_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

#endif

template <class Run>
PAGED_INLINE void with_tiles(const Run& run) {
  static constexpr TileShapes shapes = whole_tiles();
  with_tiles(shapes, run);
}

// The left factor of a product: one or two tiles of rows as they are stored, `stride` bytes apart, of which each step
// takes 32 elements, `step` bytes behind those before.
struct LeftFactor {
  const void* tiles[2];
  int64_t stride, step;
};

// The right one: a panel of columns, `[pair][columns]`, of which each step takes 16 pairs of elements.
constexpr int kPanelColumns = 32;
struct RightFactor {
  const uint32_t* panel;
  int64_t columns = kPanelColumns;
};

// sums [tall * 16][wide * 16], rows `stride` floats apart, = left x right, or added to what is there. Calls `between`
// in each step.
template <int tall, int wide, class Between>
PAGED_INLINE void add_tiles(const LeftFactor& left, const RightFactor& right, int64_t steps, float* sums,
                            int64_t stride, bool first, Between&& between) {
  const auto each = [&](const auto& f) PAGED_INLINED {
    unrolled<tall * wide>([&](auto i)
                              PAGED_INLINED { f(i, sums + i / wide * kTileRows * stride + i % wide * kTileRows); });
  };
  if (first)
    each([&](auto i, float*) PAGED_INLINED { clear_tile<i>(); });
  else
    each([&](auto i, float* at) PAGED_INLINED { load_tile<i>(at, stride * 4); });
  const char* from[] = {static_cast<const char*>(left.tiles[0]), static_cast<const char*>(left.tiles[1])};
  const char* panel = reinterpret_cast<const char*>(right.panel);
  const int64_t panel_stride = right.columns * 4;
  for (int64_t s = 0; s < steps; ++s, panel += kTileRows * panel_stride) {
    load_tile<4>(from[0], left.stride);
    load_tile<6>(panel, panel_stride);
    multiply_tiles<0, 4, 6>();
    if constexpr (wide == 2) {
      load_tile<7>(panel + kRowBytes, panel_stride);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (tall == 2) {
      load_tile<5>(from[1], left.stride);
      multiply_tiles<wide, 5, 6>();
      if constexpr (wide == 2) multiply_tiles<3, 5, 7>();
    }
    between(s);
    from[0] += left.step, from[1] += left.step;
  }
  each([&](auto i, float* at) PAGED_INLINED { store_tile<i>(at, stride * 4); });
}

// `tall` and `wide` known when the program runs.
template <class Between>
PAGED_INLINE void add_tiles(int tall, int wide, const LeftFactor& left, const RightFactor& right, int64_t steps,
                            float* sums, int64_t stride, bool first, Between&& between) {
  if (tall == 2 && wide == 2) return add_tiles<2, 2>(left, right, steps, sums, stride, first, between);
  if (tall == 2) return add_tiles<2, 1>(left, right, steps, sums, stride, first, between);
  if (wide == 2) return add_tiles<1, 2>(left, right, steps, sums, stride, first, between);
  return add_tiles<1, 1>(left, right, steps, sums, stride, first, between);
}

// 16 columns of a panel, 16 pairs each, from `count` elements of so many rows, at most 16, from `element` on; zero past
// them.
PAGED_INLINE void pack_columns(const BFloat16* const* rows, int64_t num_rows, int64_t element, int64_t count,
                               uint32_t* to, int64_t columns = kPanelColumns) {
  Vec part[kLanes] = {};
  const __mmask32 some = count >= kTileElements ? ~0u : (1u << count) - 1;
  for (int i = 0; i < kLanes && i < num_rows; ++i) part[i] = (Vec)_mm512_maskz_loadu_epi16(some, rows[i] + element);
  transpose(part);
  for (int i = 0; i < kLanes; ++i) store_as(to + i * columns, part[i]);
}

}  // namespace
}  // namespace paged::PAGED_ISA
