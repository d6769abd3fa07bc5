// Address space of a device by the driver's virtual memory management.
#include "reservation.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace paged::cuda {
namespace {

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp kind{};
  kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  kind.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return kind;
}

[[noreturn]] void fail(const Driver& driver, const char* what, CUresult error) {
  const char* name = nullptr;
  driver.error_name(error, &name);
  throw std::runtime_error(std::string(what) + ": " + (name != nullptr ? name : std::to_string(int(error))));
}

const Driver& require_driver() {
  const Driver* const found = driver();
  if (found == nullptr) throw std::runtime_error("the CUDA driver has no virtual memory management");
  return *found;
}

}  // namespace

int64_t device_page_bytes(int device) {
  const Driver* const found = driver();
  if (found == nullptr) return 0;
  int supported = 0;
  if (found->device_attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) ||
      !supported)
    return 0;
  const CUmemAllocationProp kind = memory_of(device);
  size_t bytes = 0;
  if (found->allocation_granularity(&bytes, &kind, CU_MEM_ALLOC_GRANULARITY_MINIMUM)) return 0;
  return int64_t(bytes);
}

Reservation::Reservation(int device, int64_t nbytes)
    : driver_(require_driver()), kind_(memory_of(device)), page_bytes_(size_t(device_page_bytes(device))) {
  if (page_bytes_ == 0) throw std::runtime_error("the device has no virtual memory management");
  mapped_.resize((size_t(nbytes) + page_bytes_ - 1) / page_bytes_, false);
  if (const CUresult error = driver_.address_reserve(&base_, mapped_.size() * page_bytes_, 0, 0, 0))
    fail(driver_, "cuMemAddressReserve", error);
}

Reservation::~Reservation() {
  // At the end of the process the driver may be gone, and all memory with it.
  for (int64_t page = 0; page < num_pages(); ++page)
    if (mapped_[page]) unmap_run({page, page + 1});
  driver_.address_free(base_, mapped_.size() * page_bytes_);
}

bool Reservation::map(const std::vector<PageRun>& runs) {
  check(runs, false);
  for (size_t i = 0; i < runs.size(); ++i) {
    const CUresult error = map_run(runs[i]);
    if (error == CUDA_SUCCESS) continue;
    // Nobody knows of these pages yet, so nothing can be using them.
    for (size_t k = 0; k <= i; ++k) unmap_run(runs[k]);
    if (error == CUDA_ERROR_OUT_OF_MEMORY) return false;
    fail(driver_, "memory behind pages of the pool", error);
  }
  return true;
}

void Reservation::unmap(const std::vector<PageRun>& runs) {
  check(runs, true);
  for (const PageRun& run : runs)
    if (const CUresult error = unmap_run(run)) fail(driver_, "cuMemUnmap", error);
}

CUresult Reservation::map_page(int64_t page) {
  CUmemGenericAllocationHandle memory = 0;
  if (const CUresult error = driver_.create(&memory, page_bytes_, &kind_, 0)) return error;
  const CUresult error = driver_.map(base_ + size_t(page) * page_bytes_, page_bytes_, 0, memory, 0);
  mapped_[page] = error == CUDA_SUCCESS;
  // What is mapped stays until it is unmapped.
  const CUresult released = driver_.release(memory);
  return error ? error : released;
}

CUresult Reservation::map_run(const PageRun& run) {
  for (int64_t page = run.first; page < run.end; ++page)
    if (const CUresult error = map_page(page)) return error;
  const CUmemAccessDesc access{kind_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  return driver_.set_access(base_ + size_t(run.first) * page_bytes_, size_t(run.end - run.first) * page_bytes_, &access,
                            1);
}

// Page by page, as they were mapped: a mapping is unmapped whole or not at all.
CUresult Reservation::unmap_run(const PageRun& run) {
  CUresult first_error = CUDA_SUCCESS;
  for (int64_t page = run.first; page < run.end; ++page) {
    if (!mapped_[page]) continue;
    const CUresult error = driver_.unmap(base_ + size_t(page) * page_bytes_, page_bytes_);
    if (error == CUDA_SUCCESS)
      mapped_[page] = false;
    else if (first_error == CUDA_SUCCESS)
      first_error = error;
  }
  return first_error;
}

void Reservation::check(const std::vector<PageRun>& runs, bool mapped) const {
  int64_t from = 0;
  for (const PageRun& run : runs) {
    const bool inside = from <= run.first && run.first < run.end && run.end <= num_pages();
    bool fits = inside;
    for (int64_t page = run.first; fits && page < run.end; ++page) fits = mapped_[page] == mapped;
    if (!fits) {
      std::ostringstream out;
      out << "runs: [" << run.first << ", " << run.end << "); must be ascending, in [0, " << num_pages() << "] (pages)"
          << (mapped ? " and mapped" : " and not mapped yet");
      throw std::runtime_error(out.str());
    }
    from = run.end;
  }
}

}  // namespace paged::cuda
