// Looks for bad values in tables, lengths and slots: one thread block, which goes over them all.
#include "table_checks.h"

namespace paged::cuda {
namespace {

constexpr int kThreads = 256;

// Calls `is_bad(i)` for each i below `count`, spread over the block, and stores the verdict.
template <class IsBad>
__device__ __forceinline__ void judge(int64_t count, int32_t* verdict, IsBad&& is_bad) {
  __shared__ int found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  bool bad = false;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) bad = bad || is_bad(i);
  if (bad) atomicOr(&found, 1);
  __syncthreads();
  if (threadIdx.x == 0) *verdict = found;
}

__device__ __forceinline__ bool has_bad_block(const int32_t* row, int64_t first, int64_t last, int64_t num_blocks) {
  for (int64_t i = first; i < last; ++i)
    if (row[i] < 0 || row[i] >= num_blocks) return true;
  return false;
}

__global__ void __launch_bounds__(kThreads)
    check_attention_kernel(const __grid_constant__ AttentionTables tables, int32_t* verdict) {
  const AttentionCall& call = tables.call;
  judge(call.num_seqs, verdict, [&](int64_t s) {
    const int64_t begin = call.cu_seqlens_q[s], end = call.cu_seqlens_q[s + 1];
    const bool is_first_wrong = s == 0 && begin != 0;
    const bool is_last_wrong = s == call.num_seqs - 1 && end != call.num_tokens;
    if (is_first_wrong || is_last_wrong || end < begin || end - begin > tables.max_query_len) return true;
    const int64_t seq_len = call.seq_lens[s];
    if (seq_len < 0 || seq_len > tables.max_blocks * call.block_size) return true;
    const KeyRange keys = visible_keys(call, seq_len - (end - begin), end - begin, seq_len);
    return keys.begin < keys.end &&
           has_bad_block(call.block_table + s * call.table_stride, keys.begin / call.block_size,
                         (keys.end - 1) / call.block_size + 1, tables.num_blocks);
  });
}

__global__ void __launch_bounds__(kThreads)
    check_gather_kernel(const __grid_constant__ GatheredTables tables, int32_t* verdict) {
  const SequenceTable& table = tables.table;
  judge(table.num_seqs, verdict, [&](int64_t s) {
    const int64_t seq_len = table.seq_lens[s];
    if (seq_len < 0 || seq_len > tables.max_blocks * tables.block_size || seq_len > tables.max_seq_len) return true;
    return has_bad_block(table.block_table + s * table.row_stride, 0,
                         (seq_len + tables.block_size - 1) / tables.block_size, tables.num_blocks);
  });
}

__global__ void __launch_bounds__(kThreads)
    check_slots_kernel(const int64_t* slots, int64_t num_tokens, int64_t num_slots, int32_t* verdict) {
  judge(num_tokens, verdict, [&](int64_t t) { return slots[t] < -1 || slots[t] >= num_slots; });
}

__global__ void __launch_bounds__(kThreads)
    check_pairs_kernel(const int64_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks,
                       int32_t* verdict) {
  judge(num_pairs, verdict, [&](int64_t i) {
    const int64_t src = pairs[2 * i], dst = pairs[2 * i + 1];
    return src < 0 || src >= src_blocks || dst < 0 || dst >= dst_blocks;
  });
}

}  // namespace

cudaError_t launch_check_attention(const AttentionTables& tables, int32_t* verdict, cudaStream_t stream) {
  check_attention_kernel<<<1, kThreads, 0, stream>>>(tables, verdict);
  return cudaGetLastError();
}

cudaError_t launch_check_gather(const GatheredTables& tables, int32_t* verdict, cudaStream_t stream) {
  check_gather_kernel<<<1, kThreads, 0, stream>>>(tables, verdict);
  return cudaGetLastError();
}

cudaError_t launch_check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots, int32_t* verdict,
                               cudaStream_t stream) {
  check_slots_kernel<<<1, kThreads, 0, stream>>>(slots, num_tokens, num_slots, verdict);
  return cudaGetLastError();
}

cudaError_t launch_check_pairs(const int64_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks,
                               int32_t* verdict, cudaStream_t stream) {
  check_pairs_kernel<<<1, kThreads, 0, stream>>>(pairs, num_pairs, src_blocks, dst_blocks, verdict);
  return cudaGetLastError();
}

}  // namespace paged::cuda
