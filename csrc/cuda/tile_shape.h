// How a thread block divides a tile of query rows and keys over its warps, and what it keeps in shared memory.
#pragma once

namespace paged::cuda {

// The tensor-core kernel: four warps, `kRows` packed query rows (16, 32, 64 or 128), head dimensions up to `kDim`.
// A warp has 16 or 32 rows, some of the keys and some of the value's dimensions.
template <int kDimension, int kQueryRows>
struct TileShape {
  static constexpr int kDim = kDimension, kRows = kQueryRows;
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kKeys = kDim <= 128 && kRows < 128 ? 64 : kDim <= 256 ? 32 : 16;
  static constexpr int kRowTiles = kRows == 128 ? 2 : 1;  // of 16 rows, in a warp: each key fragment is used twice
  static constexpr int kRowWarps = kRows / (16 * kRowTiles);
  static constexpr int kKeyWarps = kWarps / kRowWarps < kKeys / 16 ? kWarps / kRowWarps : kKeys / 16;
  static constexpr int kDimWarps = kWarps / kRowWarps / kKeyWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps, kWarpDim = kDim / kDimWarps;
  // Two tiles of keys and two of values keep up to 48 KB in flight. Many rows hide the copies behind arithmetic.
  static constexpr int kStages = kRows == 64 && kDim > 128 ? 1 : 2;

  // Blocks of an SM that the registers must leave room for.
  static constexpr int kMinBlocks = kRows == 16 || (kRows == 32 && kDim <= 128) ? 3 : 2;

  static constexpr int kStride = kDim + 8;  // elements of 16 bits, see SharedRows
  static constexpr int kTileElements = kKeys * kStride;
  static constexpr int kQueryElements = kRows * kStride;
  static constexpr int kOutStride = kDim + 8;  // floats; the accumulators' rows fall on different banks
  static constexpr int kLoopBytes = 2 * (kQueryElements + 2 * kStages * kTileElements);
  static constexpr int kOutBytes = kKeyWarps * kRows * (kOutStride + 2) * 4;
  static constexpr int kSharedBytes = kLoopBytes > kOutBytes ? kLoopBytes : kOutBytes;
  // What sm_86, sm_89 and sm_120 give a block.
  static_assert(kSharedBytes <= 99 * 1024);
  static_assert(kRowWarps * kKeyWarps * kDimWarps == kWarps && kWarpKeys % 16 == 0 && kWarpDim % 16 == 0);
};

// Dimensions that have a kernel of their own; any other takes the next one, its missing elements being zero.
constexpr int kTileDims[] = {64, 80, 96, 112, 128, 160, 192, 256, 512};

constexpr bool has_tile_rows(int dim, int rows) {
  return rows == 16 || (dim <= 256 && (rows == 32 || rows == 64)) || (dim <= 128 && rows == 128);
}

}  // namespace paged::cuda
