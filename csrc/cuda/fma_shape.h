// How a thread block of the float32 kernel divides a tile of query rows and keys, and what it keeps in shared memory.
#pragma once

namespace paged::cuda {

// 16 or 32 packed query rows, each worked on by 8 neighbouring lanes, which share its keys and then its dimensions.
// Twice the rows are twice the threads: as many warps of an SM, which bring each key half as often.
template <int kDimension, int kQueryRows>
struct FmaShape {
  static constexpr int kDim = kDimension, kRows = kQueryRows, kRowLanes = 8, kThreads = kRows * kRowLanes;
  static constexpr int kMinBlocks = 256 / kThreads;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kKeys = kDim <= 256 ? 32 : 16;
  static constexpr int kStages = kDim <= 128 ? 2 : 1;
  static constexpr int kStride = kDim + 4;  // floats, see SharedRows
  static constexpr int kTileElements = kKeys * kStride;
  static constexpr int kWeightStride = kKeys + kRowLanes;  // the 4 rows of a warp begin 8 banks apart
  static constexpr int kSharedBytes = 4 * (kRows * kStride + 2 * kStages * kTileElements + kRows * kWeightStride);
  static_assert(kSharedBytes <= 99 * 1024);
};

}  // namespace paged::cuda
