// Copies blocks between pools on a stream of its own: big ones by the copy engines, small ones by a kernel.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>

#include "launchers.h"
#include "swap_blocks.h"

namespace paged::cuda {
namespace {

// Below this a copy costs its launch rather than its bytes: some 3 us, in which PCIe 5 moves 150 KB. An estimate, of
// single copies at that: copies in a batch should pay off earlier. `bench ops --device cuda` has not run on hardware.
constexpr int64_t kDmaBytes = 128 * 1024;

struct Run {
  const char* src;
  char* dst;
  int64_t bytes;
};

// The copies of one layer, neighbouring blocks joined where both sides allow it. `order` sorts pairs by source.
void append_runs(const LayerCopy& layer, const int64_t* pairs, const std::vector<int64_t>& order,
                 std::vector<Run>& runs) {
  const BlockLoops loops = plan_loops(layer);
  const size_t first = runs.size();
  for (const int64_t i : order) {
    const char* const src = layer.src + pairs[2 * i] * layer.src_strides[0];
    char* const dst = layer.dst + pairs[2 * i + 1] * layer.dst_strides[0];
    for (int64_t a = 0; a < loops.sizes[0]; ++a)
      for (int64_t b = 0; b < loops.sizes[1]; ++b)
        for (int64_t c = 0; c < loops.sizes[2]; ++c) {
          const Run run{src + a * loops.src_strides[0] + b * loops.src_strides[1] + c * loops.src_strides[2],
                        dst + a * loops.dst_strides[0] + b * loops.dst_strides[1] + c * loops.dst_strides[2],
                        loops.run_bytes};
          if (runs.size() > first && runs.back().src + runs.back().bytes == run.src &&
              runs.back().dst + runs.back().bytes == run.dst)
            runs.back().bytes += run.bytes;
          else
            runs.push_back(run);
        }
  }
}

// Whether a kernel on `device` may read and write it: memory of that device, or pinned memory of the host. Memory of
// another device it reaches only where somebody has enabled peer access; the copy engines need none.
cudaError_t is_mapped(const void* pointer, int device, bool& mapped) {
  cudaPointerAttributes attributes{};
  if (const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer)) return error;
  const bool is_here = attributes.type != cudaMemoryTypeDevice || attributes.device == device;
  mapped = attributes.type != cudaMemoryTypeUnregistered && is_here && attributes.devicePointer == pointer;
  return cudaSuccess;
}

cudaError_t stream_for_swaps(int device, cudaStream_t& stream) {
  static std::mutex mutex;
  static std::map<int, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!streams[device])
    if (const cudaError_t error = cudaStreamCreateWithFlags(&streams[device], cudaStreamNonBlocking)) return error;
  stream = streams[device];
  return cudaSuccess;
}

class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (!error_) error_ = cudaSetDevice(device);
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

// Lets `later` wait for what `earlier` holds so far; where `wait`, this thread too.
cudaError_t order_streams(const DeviceStream& earlier, const DeviceStream& later, bool wait = false) {
  // An event is recorded on the device that it was made on, and waited for on any.
  const CurrentDevice device(earlier.device);
  if (device.error()) return device.error();
  cudaEvent_t event;
  if (const cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming)) return error;
  cudaError_t error = cudaEventRecord(event, earlier.stream);
  if (!error) error = cudaStreamWaitEvent(later.stream, event, 0);
  if (!error && wait) error = cudaEventSynchronize(event);
  const cudaError_t destroyed = cudaEventDestroy(event);  // the driver keeps it until it has happened
  return error ? error : destroyed;
}

cudaError_t copy_one_by_one(const std::vector<Run>& runs, cudaStream_t stream) {
  for (const Run& run : runs)
    if (const cudaError_t error = cudaMemcpyAsync(run.dst, run.src, size_t(run.bytes), cudaMemcpyDefault, stream))
      return error;
  return cudaSuccess;
}

#if CUDART_VERSION >= 12080
// One call for all runs, in any order; of a device's or pinned memory.
cudaError_t copy_as_batch(const std::vector<Run>& runs, cudaStream_t stream) {
  std::vector<void*> dst, src;
  std::vector<size_t> bytes;
  for (const Run& run : runs) {
    dst.push_back(run.dst);
    src.push_back(const_cast<char*>(run.src));
    bytes.push_back(size_t(run.bytes));
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first_with_them = 0;
#if CUDART_VERSION >= 13000
  return cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), runs.size(), &attributes, &first_with_them, 1,
                              stream);
#else
  size_t failed = 0;
  return cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), runs.size(), &attributes, &first_with_them, 1,
                              &failed, stream);
#endif
}
#endif

// By the copy engines; of pageable memory one by one, as only single copies are promised to stage it.
cudaError_t copy_by_dma(const std::vector<Run>& runs, bool mapped, cudaStream_t stream) {
#if CUDART_VERSION >= 12080
  if (mapped && runs.size() > 1) {
    const cudaError_t error = copy_as_batch(runs, stream);
    // A driver older than the runtime.
    if (error != cudaErrorNotSupported && error != cudaErrorCallRequiresNewerDriver) return error;
    cudaGetLastError();
  }
#endif
  return copy_one_by_one(runs, stream);
}

cudaError_t copy(const std::vector<LayerCopy>& layers, const int64_t* host_pairs, const int64_t* device_pairs,
                 int64_t num_pairs, const DeviceStream& swaps) {
  std::vector<int64_t> order(num_pairs);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return host_pairs[2 * a] < host_pairs[2 * b]; });
  std::vector<Run> runs;
  int64_t bytes = 0;
  bool mapped = true;
  for (const LayerCopy& layer : layers) {
    append_runs(layer, host_pairs, order, runs);
    bytes += num_pairs * layer.sizes[1] * layer.sizes[2] * layer.sizes[3] * layer.element_size;
    // Of blocks that are copied: others may have no memory behind them.
    const void* const src = layer.src + host_pairs[0] * layer.src_strides[0];
    const void* const dst = layer.dst + host_pairs[1] * layer.dst_strides[0];
    for (const void* side : {src, dst}) {
      bool side_mapped = false;
      if (const cudaError_t error = is_mapped(side, swaps.device, side_mapped)) return error;
      mapped = mapped && side_mapped;
    }
  }
  if (mapped && bytes < int64_t(runs.size()) * kDmaBytes)
    return launch_copy_blocks(layers, device_pairs, num_pairs, swaps.stream);
  return copy_by_dma(runs, mapped, swaps.stream);
}

}  // namespace

cudaError_t launch_swap_blocks(const std::vector<LayerCopy>& layers, const int64_t* host_pairs,
                               const int64_t* device_pairs, int64_t num_pairs, bool wait,
                               const std::vector<DeviceStream>& streams) {
  DeviceStream swaps{0, nullptr};
  if (const cudaError_t error = cudaGetDevice(&swaps.device)) return error;
  if (const cudaError_t error = stream_for_swaps(swaps.device, swaps.stream)) return error;
  for (const DeviceStream& stream : streams)
    if (const cudaError_t error = order_streams(stream, swaps)) return error;
  cudaError_t error = copy(layers, host_pairs, device_pairs, num_pairs, swaps);
  // After an error too: what was started reads and writes memory that the caller may free.
  for (const DeviceStream& stream : streams)
    if (const cudaError_t unordered = order_streams(swaps, stream, wait); !error) error = unordered;
  return error;
}

}  // namespace paged::cuda
