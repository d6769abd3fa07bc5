// Launches gather_cache: key and value in one grid.
#include "gather_cache.cuh"
#include "launchers.h"

namespace paged::cuda {

cudaError_t launch_gather_cache(const CacheRead& key, const CacheRead& value, const SequenceTable& table,
                                cudaStream_t stream) {
  const int64_t parts = (key.max_seq_len + kGatherTokens - 1) / kGatherTokens;
  if (table.num_seqs * parts == 0) return cudaSuccess;
  if (table.num_seqs * parts > kMaxGrid) return cudaErrorInvalidConfiguration;
  return with_type(key.element, [&](auto zero) {
    gather_cache_kernel<decltype(zero)>
        <<<dim3(unsigned(table.num_seqs * parts), 2), kGatherThreads, 0, stream>>>({key, value}, table);
    return cudaGetLastError();
  });
}

}  // namespace paged::cuda
