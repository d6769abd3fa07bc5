// The driver's virtual memory management, looked up at run time: the library also loads where there is no driver.
#pragma once
#include <cuda.h>

namespace paged::cuda {

struct Driver {
  decltype(&cuGetErrorName) error_name;
  decltype(&cuDeviceGetAttribute) device_attribute;
  decltype(&cuMemGetAllocationGranularity) allocation_granularity;
  decltype(&cuMemAddressReserve) address_reserve;
  decltype(&cuMemAddressFree) address_free;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
};

// Null where there is no driver, or one without virtual memory management.
const Driver* driver();

}  // namespace paged::cuda
