// Looks the driver's functions up in the library that the CUDA runtime uses too.
#include "driver.h"

#include <dlfcn.h>

namespace paged::cuda {
namespace {

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Driver& d) {
  return find(library, "cuGetErrorName", d.error_name) && find(library, "cuDeviceGetAttribute", d.device_attribute) &&
         find(library, "cuMemGetAllocationGranularity", d.allocation_granularity) &&
         find(library, "cuMemAddressReserve", d.address_reserve) && find(library, "cuMemAddressFree", d.address_free) &&
         find(library, "cuMemCreate", d.create) && find(library, "cuMemRelease", d.release) &&
         find(library, "cuMemMap", d.map) && find(library, "cuMemUnmap", d.unmap) &&
         find(library, "cuMemSetAccess", d.set_access);
}

}  // namespace

const Driver* driver() {
  static const Driver* const found = []() -> const Driver* {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    static Driver functions;
    return library != nullptr && find_all(library, functions) ? &functions : nullptr;
  }();
  return found;
}

}  // namespace paged::cuda
