// Address space of a device that gets memory page by page, and gives it back page by page.
//
// Source of the method: vAttention, arXiv 2405.04437, section 5; here under a paged layout, whose blocks lie anywhere.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <vector>

#include "driver.h"

namespace paged::cuda {

// Pages [first, end).
struct PageRun {
  int64_t first, end;
};

// The bytes of a page on a device; 0 where the driver or the device has no virtual memory management.
int64_t device_page_bytes(int device);

// Throws std::runtime_error where the driver refuses what it should not.
class Reservation {
 public:
  Reservation(int device, int64_t nbytes);
  // Gives all back. No work on the device may still use it.
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  void* data() const { return reinterpret_cast<void*>(base_); }
  int64_t num_pages() const { return int64_t(mapped_.size()); }

  // Puts memory behind pages that have none. False where the device has none left; nothing has changed then.
  bool map(const std::vector<PageRun>& runs);
  // Takes the memory of pages that have some. No work on the device may still use them.
  void unmap(const std::vector<PageRun>& runs);

 private:
  CUresult map_page(int64_t page);
  CUresult map_run(const PageRun& run);
  CUresult unmap_run(const PageRun& run);
  void check(const std::vector<PageRun>& runs, bool mapped) const;

  const Driver& driver_;
  CUmemAllocationProp kind_{};
  size_t page_bytes_;
  CUdeviceptr base_ = 0;
  std::vector<bool> mapped_;
};

}  // namespace paged::cuda
