// Address space that the system backs with memory only where it is written, for the pool on the CPU.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../checks.h"

namespace paged {
namespace {

constexpr uintptr_t kHugePage = 2 << 20;  // bytes: of x86-64, and of aarch64 with pages of 4 KiB

Tensor reserve(int64_t nbytes) {
  if (nbytes <= 0) reject("nbytes", text(nbytes), "greater than 0");
  void* const base =
      mmap(nullptr, size_t(nbytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::runtime_error(std::strerror(errno));
  const int64_t size = nbytes, stride = 1;
  return torch::stable::from_blob(base, {&size, 1}, {&stride, 1}, torch::stable::Device(DeviceType::CPU),
                                  ScalarType::Byte, [nbytes](void* data) { munmap(data, size_t(nbytes)); });
}

void release_pages(Tensor& storage, const Tensor& ranges) {
  const Arg storage_arg{storage, "storage"}, ranges_arg{ranges, "ranges"};
  check_dim(storage_arg, 1, "[nbytes]");
  check_dtype(storage_arg, {ScalarType::Byte});
  check_contiguous(storage_arg);
  check_dim(ranges_arg, 2, "[n, 2]");
  check_size(ranges_arg, 1, 2, "first and end");
  check_dtype(ranges_arg, {ScalarType::Long});
  check_same_device(ranges_arg, storage_arg);
  check_contiguous(ranges_arg);

  const int64_t nbytes = storage.numel(), count = ranges.size(0);
  const int64_t* const range = ranges.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < 2 * count; i += 2)
    if (range[i] < 0 || range[i] > range[i + 1] || range[i + 1] > nbytes)
      reject("ranges", text("[", range[i], ", ", range[i + 1], ") at [", i / 2, "]"),
             text("ascending and in [0, ", nbytes, "] (bytes of storage)"));

  const uintptr_t base = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr<uint8_t>());
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  for (int64_t i = 0; i < 2 * count; i += 2) {
    const uintptr_t first = (base + uintptr_t(range[i]) + page - 1) / page * page;
    const uintptr_t end = (base + uintptr_t(range[i + 1])) / page * page;
    if (first < end && madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED) != 0)
      throw std::runtime_error(text("madvise: ", std::strerror(errno)));
  }
}

// Large pages for the part of the storage that is made of whole ones; a system without them keeps its small ones.
void prefer_huge_pages(const Tensor& storage, int64_t begin, int64_t end) {
  const Arg storage_arg{storage, "storage"};
  check_dim(storage_arg, 1, "[nbytes]");
  check_dtype(storage_arg, {ScalarType::Byte});
  check_contiguous(storage_arg);
  if (begin < 0 || begin > end || end > storage.numel())
    reject("begin, end", text("[", begin, ", ", end, ")"),
           text("ascending and in [0, ", storage.numel(), "] (bytes of storage)"));

  const uintptr_t base = reinterpret_cast<uintptr_t>(storage.const_data_ptr());
  const uintptr_t first = (base + uintptr_t(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (base + uintptr_t(end)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace
}  // namespace paged

STABLE_TORCH_LIBRARY_IMPL(paged, CompositeExplicitAutograd, m) { m.impl("_reserve", TORCH_BOX(&paged::reserve)); }
STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  m.impl("_release_pages", TORCH_BOX(&paged::release_pages));
  m.impl("_prefer_huge_pages", TORCH_BOX(&paged::prefer_huge_pages));
}
