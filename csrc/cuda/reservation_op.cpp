// The torch face of address space on a device: a tensor over it, and its pages mapped and unmapped.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "reservation.h"
#include "torch_face.h"

namespace paged::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Of the tensors that are alive, by their address. Never destroyed: tensors may outlive the statics of this library.
struct Reservations {
  std::mutex mutex;
  std::map<const void*, std::unique_ptr<Reservation>> by_address;
};

Reservations& reservations() {
  static auto& all = *new Reservations;
  return all;
}

int current_device() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

int64_t page_bytes(const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  return device_page_bytes(current_device());
}

// The memory may still be in use by kernels that were launched before the last tensor over it died.
void give_back(const void* data, int device) {
  int before = 0;
  const bool switched = cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  cudaDeviceSynchronize();
  {
    const std::lock_guard<std::mutex> lock(reservations().mutex);
    reservations().by_address.erase(data);
  }
  if (switched) cudaSetDevice(before);
}

Tensor reserve(const Tensor& like, int64_t nbytes) {
  if (nbytes <= 0) reject("nbytes", text(nbytes), "greater than 0");
  const DeviceGuard guard(like.get_device_index());
  const int device = current_device();
  auto reservation = std::make_unique<Reservation>(device, nbytes);
  // torch asks the driver whose memory it is, which only knows what is mapped.
  if (!reservation->map({{0, 1}})) throw std::runtime_error("no memory is left on the device");
  void* const base = reservation->data();
  {
    const std::lock_guard<std::mutex> lock(reservations().mutex);
    reservations().by_address[base] = std::move(reservation);
  }
  const int64_t size = nbytes, stride = 1;
  return torch::stable::from_blob(base, {&size, 1}, {&stride, 1}, like.device(), ScalarType::Byte,
                                  [device](void* data) { give_back(data, device); });
}

std::vector<PageRun> runs_in(const Tensor& runs) {
  const Arg arg{runs, "runs"};
  check_dim(arg, 2, "[n, 2]");
  check_size(arg, 1, 2, "first and end");
  check_dtype(arg, {ScalarType::Long});
  check_contiguous(arg);
  if (!runs.device().is_cpu()) reject(arg, text("on ", device_name(runs)), "on cpu");
  const int64_t* const pages = runs.const_data_ptr<int64_t>();
  std::vector<PageRun> list;
  for (int64_t i = 0; i < runs.size(0); ++i) list.push_back({pages[2 * i], pages[2 * i + 1]});
  return list;
}

// The lock is held.
Reservation& reservation_of(const Tensor& storage) {
  const auto found = reservations().by_address.find(storage.const_data_ptr());
  if (found == reservations().by_address.end()) reject("storage", "another tensor", "one of _reserve_on_device");
  return *found->second;
}

bool map_pages(Tensor& storage, const Tensor& runs) {
  const std::vector<PageRun> list = runs_in(runs);
  const DeviceGuard guard(storage.get_device_index());
  const std::lock_guard<std::mutex> lock(reservations().mutex);
  return reservation_of(storage).map(list);
}

void unmap_pages(Tensor& storage, const Tensor& runs) {
  const std::vector<PageRun> list = runs_in(runs);
  const DeviceGuard guard(storage.get_device_index());
  // Of all streams: each may hold work on blocks that were free by the time the host gave them up.
  STD_CUDA_CHECK(cudaDeviceSynchronize());
  const std::lock_guard<std::mutex> lock(reservations().mutex);
  reservation_of(storage).unmap(list);
}

}  // namespace
}  // namespace paged::cuda

STABLE_TORCH_LIBRARY_IMPL(paged, CUDA, m) {
  namespace cuda = paged::cuda;
  m.impl("_device_page_bytes", TORCH_BOX(&cuda::page_bytes));
  m.impl("_reserve_on_device", TORCH_BOX(&cuda::reserve));
  m.impl("_map_pages", TORCH_BOX(&cuda::map_pages));
  m.impl("_unmap_pages", TORCH_BOX(&cuda::unmap_pages));
}
