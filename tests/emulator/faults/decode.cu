// Split-KV paged decode and its merge, whole and with one fault planted in each: what the emulator has to find.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "ptx.cuh"

enum Fault {
  kNone,
  kNoBarrierAfterWait,
  kNoBarrierBeforeRefill,
  kWaitsForOneLess,
  kReadsPastTable,
  kNoZeroFill,
  kMergesEmptySplit,
  kShufflesHalfAWarp,
  kNoBarrierAfterQuery,
  kRowOffByOne,
  kMisalignedQuery,
  kBarrierOfSomeWarps,
  kSwapsMatrixHalves,
  kSplitsShareASlot,
  kNoBarrierBeforeSum,
  kNumFaults
};

struct DecodeParams {
  const __nv_bfloat16 *query, *key_cache, *value_cache;
  const int *block_table, *seq_lens;
  __nv_bfloat16* out;
  float *part_out, *part_lse;
  int num_heads, num_kv_heads, block_size, max_blocks, num_splits;
  float scale;
};

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kTile = 64, kRows = 16;
constexpr int kHeadDim = 64, kChunks = kHeadDim / 8, kSteps = kHeadDim / 16;
constexpr int kRowBytes = kHeadDim * 2, kTileBytes = kTile * kRowBytes;
constexpr unsigned kAllLanes = 0xffffffffu;

// Byte offsets in shared memory; after the loop the partial sums lie where keys and values were.
constexpr int kQuery = 0, kKeys = kRows * kRowBytes, kValues = kKeys + 2 * kTileBytes, kEnd = kValues + 2 * kTileBytes;
constexpr int kSums = kKeys, kStats = kSums + kWarps * kRows * kHeadDim * 4;
static_assert(kStats + kWarps * kRows * 8 <= kEnd, "partial sums do not fit");

extern __shared__ __align__(128) unsigned char shared[];

// Chunk of 16 bytes of a row, swizzled so that the rows of an ldmatrix lie in different banks.
__device__ int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

__device__ uint32_t pack(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}

template <Fault fault>
__device__ void load_tile(const DecodeParams& p, const int* table, int kv_head, int seq_len, int tile, int stage) {
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads, row = index / kChunks, chunk = index % kChunks;
    const int token = tile * kTile + row;
    const bool is_there = token < seq_len;
    const int block = is_there || fault == kReadsPastTable ? table[token / p.block_size] : 0;
    const int offset = is_there ? token % p.block_size : 0;
    const int64_t source = ((int64_t(block) * p.block_size + offset) * p.num_kv_heads + kv_head) * kHeadDim + chunk * 8;
    const int to_row = fault == kRowOffByOne ? row + (row == kTile - 1) : row;
    const int target = stage * kTileBytes + swizzled(to_row, chunk);
    if (fault != kNoZeroFill || is_there) {
      cp_async_16(shared + kKeys + target, p.key_cache + source, is_there ? 16 : 0);
      cp_async_16(shared + kValues + target, p.value_cache + source, is_there ? 16 : 0);
    }
  }
}

template <Fault fault>
__device__ void load_query(const __nv_bfloat16* query, int group, uint32_t (&fragments)[kSteps][4]) {
  const int lane = threadIdx.x % 32;
  for (int index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int shift = fault == kMisalignedQuery && chunk == 3;
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (row < group) piece = *reinterpret_cast<const uint4*>(query + row * kHeadDim + chunk * 8 + shift);
    *reinterpret_cast<uint4*>(shared + kQuery + swizzled(row, chunk)) = piece;
  }
  if (fault != kNoBarrierAfterQuery) __syncthreads();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ldmatrix_x4(fragments[step], shared + kQuery + swizzled(lane & 15, step * 2 + (lane >> 4)));
}

__device__ void scores(const unsigned char* keys, const uint32_t (&query)[kSteps][4], float (&s)[2][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane >> 3;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t k[4];
    const int row = warp * 16 + (matrix >> 1) * 8 + (lane & 7);
    ldmatrix_x4(k, keys + swizzled(row, step * 2 + (matrix & 1)));
    mma_m16n8k16(s[0], query[step], k[0], k[1]);
    mma_m16n8k16(s[1], query[step], k[2], k[3]);
  }
}

template <Fault fault>
__device__ void online_softmax(float (&s)[2][4], float (&max)[2], float (&sum)[2], float (&out)[kChunks][4]) {
  float new_max[2] = {max[0], max[1]};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) new_max[j >> 1] = fmaxf(new_max[j >> 1], s[n][j]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (fault != kShufflesHalfAWarp || threadIdx.x % 32 < 16)
      new_max[half] = fmaxf(new_max[half], __shfl_xor_sync(kAllLanes, new_max[half], 1));
    new_max[half] = fmaxf(new_max[half], __shfl_xor_sync(kAllLanes, new_max[half], 2));
    const float base = new_max[half] == -INFINITY ? 0.f : new_max[half];
    const float shrink = exp2_approx(max[half] - base);
    max[half] = new_max[half];
    sum[half] *= shrink;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = half * 2; j < half * 2 + 2; ++j) sum[half] += s[n][j] = exp2_approx(s[n][j] - base);
#pragma unroll
    for (int n = 0; n < kChunks; ++n) out[n][half * 2] *= shrink, out[n][half * 2 + 1] *= shrink;
  }
}

template <Fault fault>
__device__ void accumulate(const unsigned char* values, const float (&s)[2][4], float (&out)[kChunks][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane >> 3;
  const int token_half = fault == kSwapsMatrixHalves ? matrix >> 1 : matrix & 1;
  const int dim_half = fault == kSwapsMatrixHalves ? matrix & 1 : matrix >> 1;
  const uint32_t weights[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]),
                               pack(s[1][2], s[1][3])};
#pragma unroll
  for (int n = 0; n < kSteps; ++n) {
    uint32_t v[4];
    ldmatrix_x4_transposed(v, values + swizzled(warp * 16 + token_half * 8 + (lane & 7), n * 2 + dim_half));
    mma_m16n8k16(out[2 * n], weights, v[0], v[1]);
    mma_m16n8k16(out[2 * n + 1], weights, v[2], v[3]);
  }
}

template <Fault fault>
__device__ void write_partial(const DecodeParams& p, int64_t first_slot, int split, int group, const float (&max)[2],
                              const float (&sum)[2], const float (&out)[kChunks][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* sums = reinterpret_cast<float*>(shared + kSums);
  float2* stats = reinterpret_cast<float2*>(shared + kStats);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kRows + half * 8 + (lane >> 2);
    float total = sum[half] + __shfl_xor_sync(kAllLanes, sum[half], 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if ((lane & 3) == 0) stats[row] = make_float2(max[half], total);
#pragma unroll
    for (int n = 0; n < kChunks; ++n)
      *reinterpret_cast<float2*>(sums + row * kHeadDim + n * 8 + (lane & 3) * 2) =
          make_float2(out[n][half * 2], out[n][half * 2 + 1]);
  }
  if (fault != kNoBarrierBeforeSum) __syncthreads();
  for (int index = threadIdx.x; index < group * kHeadDim; index += kThreads) {
    const int row = index / kHeadDim, dim = index % kHeadDim;
    float all_max = -INFINITY, all_sum = 0.f, weighted = 0.f;
    for (int w = 0; w < kWarps; ++w) all_max = fmaxf(all_max, stats[w * kRows + row].x);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_approx(stats[w * kRows + row].x - all_max);
      all_sum += weight * stats[w * kRows + row].y;
      weighted += weight * sums[(w * kRows + row) * kHeadDim + dim];
    }
    const int64_t slot = first_slot + int64_t(row) * p.num_splits + (fault == kSplitsShareASlot ? 0 : split);
    p.part_out[slot * kHeadDim + dim] = weighted / all_sum;
    if (dim == 0) p.part_lse[slot] = all_max + log2f(all_sum);
  }
}

template <Fault fault>
__global__ void __launch_bounds__(kThreads) decode(DecodeParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;
  const int seq_len = p.seq_lens[sequence];
  const int num_tiles = (seq_len + kTile - 1) / kTile, per_split = (num_tiles + p.num_splits - 1) / p.num_splits;
  const int first = split * per_split, last = min(num_tiles, first + per_split);
  const int64_t first_head = int64_t(sequence) * p.num_heads + kv_head * group;
  if (first >= last) {
    if (threadIdx.x < group) p.part_lse[(first_head + threadIdx.x) * p.num_splits + split] = -INFINITY;
    return;
  }
  const int* table = p.block_table + int64_t(sequence) * p.max_blocks;

  load_tile<fault>(p, table, kv_head, seq_len, first, 0);
  cp_async_commit();
  uint32_t query[kSteps][4];
  load_query<fault>(p.query + first_head * kHeadDim, group, query);

  float out[kChunks][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int tile = first; tile < last; ++tile) {
    const int stage = (tile - first) & 1;
    if (tile + 1 < last) load_tile<fault>(p, table, kv_head, seq_len, tile + 1, stage ^ 1);
    cp_async_commit();
    cp_async_wait<fault == kWaitsForOneLess ? 2 : 1>();
    if (fault != kNoBarrierAfterWait) __syncthreads();

    float s[2][4] = {};
    scores(shared + kKeys + stage * kTileBytes, query, s);
    const int token = tile * kTile + warp * 16 + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        s[n][j] = token + n * 8 + (j & 1) < seq_len ? s[n][j] * p.scale * float(M_LOG2E) : -INFINITY;
    online_softmax<fault>(s, max, sum, out);
    accumulate<fault>(shared + kValues + stage * kTileBytes, s, out);
    if (fault == kBarrierOfSomeWarps && tile * kTile + warp * 16 >= seq_len) continue;
    if (fault != kNoBarrierBeforeRefill) __syncthreads();
  }
  cp_async_wait<0>();
  write_partial<fault>(p, first_head * p.num_splits, split, group, max, sum, out);
}

template <Fault fault>
__global__ void __launch_bounds__(kHeadDim) merge(DecodeParams p) {
  float* weights = reinterpret_cast<float*>(shared);
  const int64_t head = int64_t(blockIdx.y) * p.num_heads + blockIdx.x, first = head * p.num_splits;
  const int lane = threadIdx.x;
  if (lane < 32) {
    const float lse = lane < p.num_splits ? p.part_lse[first + lane] : -INFINITY;
    float max = lse;
    for (int i = 16; i; i >>= 1) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, i));
    const float weight = max == -INFINITY ? 0.f : exp2_approx(lse - max);
    float sum = weight;
    for (int i = 16; i; i >>= 1) sum += __shfl_down_sync(kAllLanes, sum, i);
    sum = __shfl_sync(kAllLanes, sum, 0);
    const unsigned live = __ballot_sync(kAllLanes, weight > 0.f);
    weights[lane] = weight / sum;
    if (lane == 0) reinterpret_cast<unsigned*>(weights)[32] = live;
  }
  __syncthreads();
  const unsigned live = reinterpret_cast<unsigned*>(weights)[32];
  float out = 0.f;
  for (int split = 0; split < p.num_splits; ++split)
    if (fault == kMergesEmptySplit || live >> split & 1)
      out += weights[split] * p.part_out[(first + split) * kHeadDim + threadIdx.x];
  p.out[head * kHeadDim + threadIdx.x] = __float2bfloat16_rn(out);
}

// Instantiates the pair of kernels of every fault.
template <int... faults>
void instantiate() {
  (decode<Fault(faults)><<<1, 1>>>({}), ...);
  (merge<Fault(faults)><<<1, 1>>>({}), ...);
}

}  // namespace

void every_fault() { instantiate<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(); }
static_assert(kNumFaults == 15, "every_fault instantiates them all");
