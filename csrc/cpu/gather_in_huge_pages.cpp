// Memory that is written already, moved into large pages in place.
#include <fcntl.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <iterator>
#include <utility>
#include <vector>

#include "../checks.h"

namespace paged {
namespace {

constexpr uintptr_t kPage = 4096, kHugePage = 2 << 20;  // bytes
constexpr uintptr_t kNeighbours = 8192;                 // bytes, at most what malloc leaves between two mappings
constexpr int kCollapse = 25;                           // MADV_COLLAPSE, of Linux 6.1

using Range = std::pair<uintptr_t, uintptr_t>;

std::vector<Range> ranges_of(const std::vector<Tensor>& storages) {
  std::vector<Range> ranges;
  for (const Tensor& storage : storages) {
    const Arg argument{storage, "storages"};
    check_dim(argument, 1, "[nbytes]");
    check_dtype(argument, {ScalarType::Byte});
    check_contiguous(argument);
    const uintptr_t first = reinterpret_cast<uintptr_t>(storage.const_data_ptr());
    ranges.push_back({first, first + uintptr_t(storage.numel())});
  }
  std::sort(ranges.begin(), ranges.end());
  std::vector<Range> merged;
  for (const Range& range : ranges)
    if (!merged.empty() && range.first <= merged.back().second + kNeighbours)
      merged.back().second = std::max(merged.back().second, range.second);
    else
      merged.push_back(range);
  return merged;
}

// Mappings that are neither a file's nor shared, in ascending order; none where the system does not tell.
std::vector<Range> private_mappings() {
  std::vector<Range> mappings;
  if (FILE* const maps = std::fopen("/proc/self/maps", "r")) {
    uintptr_t first, last, inode;
    char may[8];
    while (std::fscanf(maps, "%" SCNxPTR "-%" SCNxPTR " %7s %*s %*s %" SCNuPTR "%*[^\n]", &first, &last, may, &inode) ==
           4)
      if (inode == 0 && may[3] == 'p') mappings.push_back({first, last});
    std::fclose(maps);
  }
  return mappings;
}

// Whether all of a large page is in memory and no other process has a part of it too: after a fork it would be copied.
bool is_own(int pagemap, uintptr_t address) {
  constexpr uint64_t kOwn = 1ull << 56, kPresent = 1ull << 63;
  uint64_t entries[kHugePage / kPage];
  if (pread(pagemap, entries, sizeof entries, off_t(address / kPage * sizeof *entries)) != sizeof entries) return false;
  return std::all_of(std::begin(entries), std::end(entries),
                     [](uint64_t entry) { return (entry & kOwn) && (entry & kPresent); });
}

int64_t gather_in_huge_pages(const std::vector<Tensor>& storages) {
  const std::vector<Range> wanted = ranges_of(storages);
  if (sysconf(_SC_PAGESIZE) != long(kPage)) return 0;
  const std::vector<Range> mappings = private_mappings();
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return 0;
  int64_t moved = 0;
  for (const Range& range : wanted)
    for (const Range& mapping : mappings) {
      const uintptr_t first = std::max(range.first, mapping.first), last = std::min(range.second, mapping.second);
      for (uintptr_t page = (first + kHugePage - 1) / kHugePage * kHugePage; page + kHugePage <= last;
           page += kHugePage)
        if (is_own(pagemap, page) && madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) == 0)
          moved += int64_t(kHugePage);
    }
  close(pagemap);
  return moved;
}

}  // namespace
}  // namespace paged

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) { m.impl("_gather_in_huge_pages", TORCH_BOX(&paged::gather_in_huge_pages)); }
