// Stands in for the CUDA driver's virtual memory management: address space of this process, which only what has memory
// mapped and access granted can be read and written in. Notes every misuse, as a driver would rather crash of some.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "cudart.h"

namespace {

struct Mapping {
  size_t size;
  CUmemGenericAllocationHandle memory;
  bool has_access;
  int64_t work_before;
};
struct Memory {
  size_t size;
  int uses;  // the handle is one, each mapping another
};

int64_t page_bytes = 2 << 20, free_bytes = INT64_MAX;
std::map<CUdeviceptr, size_t> reserved;
std::map<CUdeviceptr, Mapping> mapped;
std::map<CUmemGenericAllocationHandle, Memory> memories;
CUmemGenericAllocationHandle last_memory = 0;
std::string misuse;

CUresult refuse(const char* what) {
  if (misuse.empty()) misuse = what;
  return CUDA_ERROR_INVALID_VALUE;
}

void drop_use(CUmemGenericAllocationHandle memory) {
  if (--memories[memory].uses > 0) return;
  free_bytes += int64_t(memories[memory].size);
  memories.erase(memory);
}

bool is_reserved(CUdeviceptr first, size_t size) {
  const auto after = reserved.upper_bound(first);
  if (after == reserved.begin()) return false;
  const auto [base, length] = *std::prev(after);
  return first + size <= base + length;
}

CUresult CUDAAPI error_name(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult CUDAAPI device_attribute(int* value, CUdevice_attribute, CUdevice) {
  *value = page_bytes > 0;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI granularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = size_t(page_bytes);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI address_reserve(CUdeviceptr* base, size_t size, size_t, CUdeviceptr, unsigned long long) {
  if (size == 0 || size % page_bytes) return refuse("cuMemAddressReserve: not whole pages");
  void* const found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *base = reinterpret_cast<CUdeviceptr>(found);
  reserved[*base] = size;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI address_free(CUdeviceptr base, size_t size) {
  const auto found = reserved.find(base);
  if (found == reserved.end() || found->second != size) return refuse("cuMemAddressFree: not a whole reservation");
  const auto inside = mapped.lower_bound(base);
  if (inside != mapped.end() && inside->first < base + size) return refuse("cuMemAddressFree: memory is mapped in it");
  munmap(reinterpret_cast<void*>(base), size);
  reserved.erase(found);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI create(CUmemGenericAllocationHandle* memory, size_t size, const CUmemAllocationProp* kind,
                        unsigned long long) {
  if (size == 0 || size % page_bytes) return refuse("cuMemCreate: not whole pages");
  if (kind->type != CU_MEM_ALLOCATION_TYPE_PINNED || kind->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
    return refuse("cuMemCreate: not memory of a device");
  if (int64_t(size) > free_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  free_bytes -= int64_t(size);
  *memory = ++last_memory;
  memories[*memory] = {size, 1};
  return CUDA_SUCCESS;
}

CUresult CUDAAPI release(CUmemGenericAllocationHandle memory) {
  if (!memories.count(memory)) return refuse("cuMemRelease: no such memory");
  drop_use(memory);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI map(CUdeviceptr first, size_t size, size_t offset, CUmemGenericAllocationHandle memory,
                     unsigned long long) {
  if (!memories.count(memory) || memories[memory].size != size || offset != 0)
    return refuse("cuMemMap: not the whole of a memory");
  if (first % page_bytes || !is_reserved(first, size)) return refuse("cuMemMap: not whole pages of a reservation");
  const auto next = mapped.lower_bound(first);
  const bool meets_next = next != mapped.end() && next->first < first + size;
  const bool meets_previous = next != mapped.begin() && std::prev(next)->first + std::prev(next)->second.size > first;
  if (meets_next || meets_previous) return refuse("cuMemMap: memory is mapped there already");
  mapped[first] = {size, memory, false, work_launched()};
  ++memories[memory].uses;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI set_access(CUdeviceptr first, size_t size, const CUmemAccessDesc* access, size_t count) {
  if (count != 1 || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
    return refuse("cuMemSetAccess: not to read and write");
  for (CUdeviceptr at = first; at < first + size; at += mapped[at].size)
    if (!mapped.count(at)) return refuse("cuMemSetAccess: no memory is mapped there");
  mprotect(reinterpret_cast<void*>(first), size, PROT_READ | PROT_WRITE);
  for (CUdeviceptr at = first; at < first + size; at += mapped[at].size) {
    // New memory holds anything: here NaN in every floating-point format.
    if (!mapped[at].has_access) std::memset(reinterpret_cast<void*>(at), 0xFF, mapped[at].size);
    mapped[at].has_access = true;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI unmap(CUdeviceptr first, size_t size) {
  const auto found = mapped.find(first);
  if (found == mapped.end() || found->second.size != size) return refuse("cuMemUnmap: not the whole of a mapping");
  if (work_launched() > work_finished() && work_launched() > found->second.work_before)
    return refuse("cuMemUnmap: work that may use it has not finished");
  madvise(reinterpret_cast<void*>(first), size, MADV_DONTNEED);
  mprotect(reinterpret_cast<void*>(first), size, PROT_NONE);
  drop_use(found->second.memory);
  mapped.erase(found);
  return CUDA_SUCCESS;
}

const std::map<std::string, void*>& functions() {
  static const std::map<std::string, void*> all = {
      {"cuGetErrorName", reinterpret_cast<void*>(&error_name)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(&device_attribute)},
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(&granularity)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(&address_reserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(&address_free)},
      {"cuMemCreate", reinterpret_cast<void*>(&create)},
      {"cuMemRelease", reinterpret_cast<void*>(&release)},
      {"cuMemMap", reinterpret_cast<void*>(&map)},
      {"cuMemUnmap", reinterpret_cast<void*>(&unmap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(&set_access)},
  };
  return all;
}

}  // namespace

bool has_memory(const void* address) {
  const CUdeviceptr at = reinterpret_cast<CUdeviceptr>(address);
  if (!is_reserved(at, 1)) return true;
  const auto after = mapped.upper_bound(at);
  return after != mapped.begin() && at < std::prev(after)->first + std::prev(after)->second.size;
}

extern "C" {

void* __wrap_dlopen(const char* name, int) {
  return std::strcmp(name, "libcuda.so.1") == 0 ? const_cast<void*>(static_cast<const void*>(&functions())) : nullptr;
}
void* __wrap_dlsym(void*, const char* name) {
  const auto found = functions().find(name);
  return found == functions().end() ? nullptr : found->second;
}

#define VISIBLE __attribute__((visibility("default")))

// `page` 0: a device without virtual memory management. `memory`: bytes that are left on the device.
VISIBLE void emulate_driver(int64_t page, int64_t memory) {
  page_bytes = page;
  free_bytes = memory;
}
VISIBLE void emulated_driver_state(int64_t* reserved_bytes, int64_t* mapped_bytes, int64_t* created_bytes) {
  *reserved_bytes = *mapped_bytes = *created_bytes = 0;
  for (const auto& [base, size] : reserved) *reserved_bytes += int64_t(size);
  for (const auto& [first, mapping] : mapped) *mapped_bytes += int64_t(mapping.size);
  for (const auto& [handle, memory] : memories) *created_bytes += int64_t(memory.size);
}
// What was first done wrong since the last call; "" where nothing was.
VISIBLE const char* emulated_driver_misuse() {
  static std::string told;
  told = misuse;
  misuse.clear();
  return told.c_str();
}
// The next bytes from `address` on, of a reservation, that are mapped: [first, end). False where there are none, or
// where the address is in no reservation.
VISIBLE int next_mapped(uint64_t address, uint64_t* first, uint64_t* end) {
  if (!is_reserved(address, 1)) return 0;
  auto at = mapped.lower_bound(address);
  if (at == mapped.end()) return 0;
  *first = at->first;
  for (*end = at->first; at != mapped.end() && at->first == *end; ++at) *end += at->second.size;
  return 1;
}
VISIBLE void* emulated_driver_function(const char* name) { return __wrap_dlsym(nullptr, name); }
VISIBLE int is_reservation(uint64_t address) { return int(reserved.count(address)); }
VISIBLE void emulate_work() { ++work_launched(); }
VISIBLE void emulate_waiting() { work_finished() = work_launched(); }

}  // extern "C"
