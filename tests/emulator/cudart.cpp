// Stands in for the CUDA runtime: hands every launch to a callback, with the PTX that the kernel was registered with.
//
// The device is one of compute capability 8.6, the one with the least shared memory of those that the kernels are for.
#include "cudart.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>

namespace {

struct Kernel {
  const void* fat_binary;
  std::string name;
  size_t max_dynamic_shared = 48 * 1024;
};

// Static initialisers of other files register kernels, so this must exist before any of them.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> registered;
  return registered;
}

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared;
  cudaStream_t stream;
};

constexpr int kNumMultiprocessors = 16, kThreadsPerMultiprocessor = 1536, kBlocksPerMultiprocessor = 16;
constexpr size_t kMaxSharedPerBlock = 99 * 1024, kSharedPerMultiprocessor = 100 * 1024, kReservedShared = 1024;

LaunchCallback launch_callback = nullptr;
Launch configured;
cudaError_t last_error = cudaSuccess;
bool has_batched_copies = true, launches_fail = false;
int64_t single_copies = 0, batched_copies = 0;

// The order of what happens on streams, a line each.
std::string stream_log;
void note(const std::string& line) { stream_log += line + '\n'; }
// The one that torch_face.cpp gives as torch's, the one that was made, or the default stream, which is neither.
std::string name_of(cudaStream_t stream) {
  return stream == kTorchStream ? "current" : stream == nullptr ? "default" : "own";
}

struct Event {
  cudaStream_t recorded_on = nullptr;
};
Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

// Memory that is not what all other memory counts as: [first, end) to type and device.
struct Place {
  uintptr_t end;
  cudaMemoryType type;
  int device;
};
std::map<uintptr_t, Place> places;

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const void* function, const Launch& launch, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return keep(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = found->second;
  const dim3 grid = launch.grid, block = launch.block;
  const bool is_valid = launch.dynamic_shared <= kernel.max_dynamic_shared && block.x * block.y * block.z <= 1024 &&
                        block.x * block.y * block.z > 0 && block.z <= 64 && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
                        grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16;
  if (!is_valid || launches_fail) return keep(cudaErrorInvalidConfiguration);
  ++work_launched();
  note(name_of(launch.stream) + " kernel");
  const unsigned grid_sizes[] = {grid.x, grid.y, grid.z}, block_sizes[] = {block.x, block.y, block.z};
  const int failed = launch_callback(kernel.fat_binary, kernel.name.c_str(), grid_sizes, block_sizes,
                                     launch.dynamic_shared, arguments);
  return keep(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

int attribute(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return kNumMultiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return kThreadsPerMultiprocessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return kBlocksPerMultiprocessor;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return kMaxSharedPerBlock;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return kSharedPerMultiprocessor;
    case cudaDevAttrReservedSharedMemoryPerBlock: return kReservedShared;
    case cudaDevAttrComputeCapabilityMajor: return 8;
    case cudaDevAttrComputeCapabilityMinor: return 6;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrL2CacheSize: return 6 << 20;
    default: return -1;
  }
}

}  // namespace

int64_t& work_launched() {
  static int64_t count = 0;
  return count;
}
int64_t& work_finished() {
  static int64_t count = 0;
  return count;
}

extern "C" {

__attribute__((visibility("default"))) void emulate_launches(LaunchCallback callback) { launch_callback = callback; }

void** __cudaRegisterFatBinary(void* wrapper) {
  // The wrapper holds a magic number, a version and the pointer; the handle only has to lead back to it.
  return reinterpret_cast<void**>(static_cast<char*>(wrapper) + 8);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** fat_binary, const char* function, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[function] = {*fat_binary, name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream) {
  configured = {grid, block, dynamic_shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_shared, void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *dynamic_shared = configured.dynamic_shared;
  *static_cast<cudaStream_t*>(stream) = configured.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream}, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return keep(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (size_t(value) > kMaxSharedPerBlock) return keep(cudaErrorInvalidValue);
    found->second.max_dynamic_shared = value;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num_blocks, const void*, int block_size,
                                                                   size_t dynamic_shared, unsigned) {
  // Without the registers, of which PTX knows nothing.
  const int by_threads = kThreadsPerMultiprocessor / std::max(block_size, 1);
  const int by_shared = int(kSharedPerMultiprocessor / (dynamic_shared + kReservedShared));
  *num_blocks = std::min({kBlocksPerMultiprocessor, by_threads, by_shared});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* function, int block_size,
                                                          size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(num_blocks, function, block_size, dynamic_shared, 0);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return *value < 0 ? keep(cudaErrorNotSupported) : cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the emulator found an error in a kernel" : "emulated CUDA error";
}
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }

__attribute__((visibility("default"))) void emulate_batched_copies(int supported) { has_batched_copies = supported; }
// Whether every launch from now on is refused.
__attribute__((visibility("default"))) void emulate_refused_launches(int refused) { launches_fail = refused; }
// What happened on streams since the last call.
__attribute__((visibility("default"))) const char* emulated_streams() {
  static std::string told;
  told = std::exchange(stream_log, {});
  return told.c_str();
}
// Makes `size` bytes memory of a type, as of cudaMemoryType, and of a device; of no type, what it was.
__attribute__((visibility("default"))) void emulate_memory(uint64_t address, uint64_t size, int type, int device) {
  if (type < 0)
    places.erase(address);
  else
    places[address] = {address + size, cudaMemoryType(type), device};
}
// How many copies were asked for one by one, and how many in batches, since the last call.
__attribute__((visibility("default"))) void emulated_copies(int64_t* single, int64_t* batched) {
  *single = std::exchange(single_copies, 0);
  *batched = std::exchange(batched_copies, 0);
}

// Work on a stream is done by the time its call returns, though the host is not to count on it.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t stream) {
  ++work_launched();
  note(name_of(stream) + " copy");
  ++single_copies;
  std::memmove(to, from, count);
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
// In no order that a caller could count on.
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* sizes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* first, size_t num_attributes,
                                 cudaStream_t stream) {
  if (!has_batched_copies) return keep(cudaErrorCallRequiresNewerDriver);
  if (stream == nullptr || count == 0 || num_attributes != 1 || *first != 0 ||
      attributes->srcAccessOrder != cudaMemcpySrcAccessOrderStream)
    return keep(cudaErrorInvalidValue);
  ++work_launched();
  note(name_of(stream) + " copies");
  batched_copies += int64_t(count);
  for (size_t i = count; i-- > 0;) std::memcpy(to[i], from[i], sizes[i]);
  return cudaSuccess;
}
#endif
cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t) {
  std::memset(to, value, count);
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  note("host after all");
  work_finished() = work_launched();
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note("host after " + name_of(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) return keep(cudaErrorNotSupported);
  *stream = reinterpret_cast<cudaStream_t>(1);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  note(name_of(stream) + " after " + name_of(event_of(event)->recorded_on));
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event_of(event)->recorded_on = stream;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  note("host after " + name_of(event_of(event)->recorded_on));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}
// All memory counts as pinned memory of the host, but for addresses of the device that have none, and where a test says
// what it is.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = {};
  attributes->type = has_memory(address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  const auto after = places.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (after != places.begin() && reinterpret_cast<uintptr_t>(address) < std::prev(after)->second.end) {
    attributes->type = std::prev(after)->second.type;
    attributes->device = std::prev(after)->second.device;
  }
  attributes->devicePointer = attributes->type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

}  // extern "C"
