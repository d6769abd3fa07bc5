// How many blocks of a kernel the current device runs at once, remembered.
#include <map>
#include <mutex>
#include <utility>

#include "device_limits.h"

namespace paged::cuda {
namespace {

cudaError_t ask(const void* kernel, int threads, int shared_bytes, int device, int& blocks) {
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  int multiprocessors = 0, blocks_each = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, threads, shared_bytes))
    return error;
  blocks = multiprocessors * blocks_each;
  return cudaSuccess;
}

}  // namespace

cudaError_t blocks_at_once(const void* kernel, int threads, int shared_bytes, int& blocks) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    blocks = found->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = ask(kernel, threads, shared_bytes, device, blocks)) return error;
  known[{kernel, device}] = blocks;
  return cudaSuccess;
}

}  // namespace paged::cuda
