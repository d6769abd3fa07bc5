// Launches attention: picks kernels by size, divides the keys over thread blocks, merges the parts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <utility>

#include "attention.h"
#include "device_limits.h"
#include "tile_shape.h"

namespace paged::cuda {
namespace {

constexpr int64_t kAnyRows = int64_t(1) << 40;
constexpr int64_t kMaxSplits = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest tile that takes so many rows at once, or the largest tile.
int rows_of_tile(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128; }

template <typename T, size_t... kIndex>
AttentionKernel tile_kernel(int64_t dim, int rows, std::index_sequence<kIndex...>) {
  AttentionKernel kernel;
  (void)((dim <= kTileDims[kIndex] && (kernel = attention_tile_of<T, kTileDims[kIndex]>(rows), true)) || ...);
  return kernel;
}

// The kernel with tiles of `rows`, or the largest below that was compiled.
AttentionKernel find_kernel(const AttentionRequest& request, int rows) {
  const int64_t dim = std::max(request.call.head_dim, request.call.v_head_dim);
  if (request.type == Element::kFloat32) return attention_fma_of(int(dim), rows);
  constexpr auto dims = std::make_index_sequence<std::size(kTileDims)>();
  for (;; rows /= 2) {
    const AttentionKernel kernel = request.type == Element::kBFloat16 ? tile_kernel<__nv_bfloat16>(dim, rows, dims)
                                                                      : tile_kernel<__half>(dim, rows, dims);
    if (kernel.function) return kernel;
  }
}

// Whether rows with elements of `size` bytes all begin at 16-byte boundaries.
bool in_16_bytes(const void* data, int64_t size, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % 16) return false;
  return std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride * size % 16 == 0; });
}

// Keys that a tile's rows see at most.
int64_t longest_range(const AttentionRequest& request, int rows) {
  const AttentionCall& call = request.call;
  if (call.sliding_window == 0) return request.max_seq_len;
  const int64_t queries = std::min(ceil_div(rows, call.num_heads / call.num_kv_heads) + 1, request.max_query_len);
  return std::min(request.max_seq_len, call.sliding_window * (call.causal ? 1 : 2) + queries);
}

// The fewest splits that keep the device at least 85 % as busy as the best number does; FlashAttention-2's rule.
int64_t splits_for(int64_t blocks, int64_t at_once, int64_t key_tiles) {
  if (blocks * 10 >= at_once * 8) return 1;
  const int64_t most = std::min({kMaxSplits, at_once, key_tiles});
  const auto busy = [&](int64_t splits) {
    const double waves = double(blocks * splits) / double(at_once);
    return waves / double(ceil_div(blocks * splits, at_once));
  };
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, busy(splits));
  for (int64_t splits = 1; splits <= most; ++splits)
    if (busy(splits) >= 0.85 * best) return splits;
  return 1;
}

cudaError_t choose_splits(const AttentionRequest& request, AttentionLaunch& launch) {
  const AttentionCall& call = request.call;
  const int64_t keys = longest_range(request, launch.kernel.rows);
  const int64_t key_tiles = std::max<int64_t>(1, ceil_div(keys, launch.kernel.keys));
  int blocks = 0;
  if (const cudaError_t error =
          blocks_at_once(launch.kernel.function, launch.kernel.threads, launch.kernel.shared_bytes, blocks))
    return error;
  int64_t splits;
  if (request.num_splits > 0) {
    splits = std::min({request.num_splits, key_tiles, int64_t(65535)});
  } else if (request.deterministic) {
    launch.params.deterministic = true;
    // Many rows fill the device as they are, and their parts would take up to 32 times the memory of the output.
    splits = launch.params.min_rows > 0
                 ? 1
                 : std::clamp<int64_t>(ceil_div(keys, kDeterministicSplit), 1, kMaxDeterministicSplits);
  } else {
    const int64_t rows = call.num_tokens * (call.num_heads / call.num_kv_heads);
    const int64_t tiles = std::min(launch.tiles, std::max<int64_t>(1, ceil_div(rows, launch.kernel.rows)));
    splits =
        splits_for((launch.params.one_tile_a_sequence ? launch.tiles : tiles) * call.num_kv_heads, blocks, key_tiles);
  }
  launch.params.num_splits = int(splits);
  return cudaSuccess;
}

// Of all splits, tiles and KV heads: not of tokens, most of which may be another launch's.
int64_t partial_rows(const AttentionLaunch& launch) {
  return launch.params.num_splits * launch.tiles * launch.params.call.num_kv_heads * launch.params.tile_rows;
}

// Adds the launch for sequences of more than `min_rows` and up to `max_rows` packed rows.
cudaError_t add_launch(const AttentionRequest& request, const AttentionParams& params, int rows, int64_t min_rows,
                       int64_t max_rows, AttentionPlan& plan) {
  AttentionLaunch& launch = plan.launches[plan.num_launches++];
  launch.kernel = find_kernel(request, rows);
  launch.params = params;
  const AttentionCall& call = request.call;
  const int64_t group = call.num_heads / call.num_kv_heads, tile_rows = launch.kernel.rows;
  const int64_t longest = std::min(request.max_query_len * group, max_rows);
  launch.params.min_rows = min_rows;
  launch.params.max_rows = longest;
  launch.params.one_tile_a_sequence = longest <= tile_rows;
  if (launch.params.one_tile_a_sequence) {
    launch.tiles = call.num_seqs;
  } else {
    // Each sequence fills its tiles but for the last.
    const int64_t all_rows = call.num_tokens * group;
    const int64_t sequences = std::min(call.num_seqs, all_rows / (min_rows + 1));
    launch.tiles = std::min(call.num_seqs * ceil_div(longest, tile_rows), all_rows / tile_rows + sequences);
  }
  launch.params.tile_rows = int(std::min(longest, tile_rows));
  if (const cudaError_t error = choose_splits(request, launch)) return error;
  if (launch.params.num_splits > 1)
    plan.workspace_floats = std::max(plan.workspace_floats, partial_rows(launch) * (call.v_head_dim + 1));
  return cudaSuccess;
}

cudaError_t launch_one(const AttentionLaunch& launch, Element type, float* workspace, cudaStream_t stream) {
  AttentionParams params = launch.params;
  const AttentionCall& call = params.call;
  params.partial_out = workspace;
  params.partial_lse = workspace + partial_rows(launch) * call.v_head_dim;
  const unsigned tiles = unsigned(launch.tiles), kv_heads = unsigned(call.num_kv_heads);
  void* arguments[] = {&params};
  if (const cudaError_t error =
          cudaLaunchKernel(launch.kernel.function, dim3(tiles, kv_heads, params.num_splits),
                           dim3(launch.kernel.threads), arguments, launch.kernel.shared_bytes, stream))
    return error;
  if (params.num_splits == 1) return cudaSuccess;

  const MergeKernel merge = attention_merge_of(type);
  int tile_rows = launch.kernel.rows;
  void* merge_arguments[] = {&params, &tile_rows};
  return cudaLaunchKernel(merge.function, dim3(tiles, kv_heads, ceil_div(tile_rows, merge.rows_a_block)),
                          dim3(merge.threads), merge_arguments, 0, stream);
}

}  // namespace

cudaError_t plan_attention(const AttentionRequest& request, AttentionPlan& plan) {
  const AttentionCall& call = request.call;
  const int64_t size = request.type == Element::kFloat32 ? 4 : 2;
  AttentionParams params{};
  params.call = call;
  while ((int64_t(1) << params.log2_block_size) < call.block_size) ++params.log2_block_size;
  params.query_in_16_bytes = in_16_bytes(call.query, size, {call.query_token_stride, call.query_head_stride});
  params.key_in_16_bytes =
      call.key.dim == 1 && in_16_bytes(call.key_cache, size, {call.key.block, call.key.token, call.key.head});
  params.value_in_16_bytes = in_16_bytes(call.value_cache, size, {call.value.block, call.value.token, call.value.head});
  plan.type = request.type;

  const int64_t group = call.num_heads / call.num_kv_heads;
  const int64_t longest = request.max_query_len * group, few = std::max<int64_t>(16, group);
  const bool is_even = call.num_tokens == call.num_seqs * request.max_query_len;
  const int largest = find_kernel(request, 128).rows;
  const bool has_few = longest > 4 * few && !is_even && find_kernel(request, rows_of_tile(few)).rows < largest;
  int64_t done = 0;
  // Where rows may not depend on their batch, each sequence gets the kernel, and the rule for splits, of its own size.
  // Otherwise one kernel does, unless single queries go along with many.
  if (request.deterministic || has_few) {
    if (const cudaError_t error = add_launch(request, params, rows_of_tile(few), 0, few, plan)) return error;
    done = few;
  }
  if (request.deterministic && done < 64 && longest > done) {
    if (const cudaError_t error = add_launch(request, params, 64, done, 64, plan)) return error;
    done = 64;
  }
  if (longest <= done) return cudaSuccess;
  return add_launch(request, params, request.deterministic ? largest : rows_of_tile(longest), done, kAnyRows, plan);
}

cudaError_t launch_attention(const AttentionPlan& plan, float* workspace, cudaStream_t stream) {
  for (int i = 0; i < plan.num_launches; ++i)
    if (plan.launches[i].tiles > 0)
      if (const cudaError_t error = launch_one(plan.launches[i], plan.type, workspace, stream)) return error;
  return cudaSuccess;
}

}  // namespace paged::cuda
