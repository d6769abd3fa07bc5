// Lets the torch face of the CUDA kernels work on tensors of the CPU: the linker puts these in the place of torch's.
//
// `--wrap=f` turns calls of f into calls of __wrap_f; torch's own is __real_f.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cudart.h"

namespace {

// `initialised` is 0 where the memory holds nothing yet.
using AllocationCallback = void (*)(void* data, int64_t bytes, int initialised);
AllocationCallback allocation_callback = nullptr;

void allocated(AtenTensorHandle tensor, bool initialised) {
  void* data = nullptr;
  int64_t bytes = 0;
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_storage_size(tensor, &bytes);
  allocation_callback(data, bytes, initialised);
}

bool begins_with(const std::string& text, const char* beginning) { return text.rfind(beginning, 0) == 0; }

void after_dispatch(const char* op, StableIValue* stack) {
  const std::string name = op;
  const bool is_empty = begins_with(name, "aten::empty") || begins_with(name, "aten::new_empty");
  const bool is_filled = begins_with(name, "aten::zeros") || begins_with(name, "aten::new_zeros") ||
                         begins_with(name, "aten::full") || begins_with(name, "aten::new_full") ||
                         begins_with(name, "aten::copy_");
  if (is_empty || is_filled) allocated(reinterpret_cast<AtenTensorHandle>(stack[0]), is_filled);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulate_allocations(AllocationCallback callback) {
  allocation_callback = callback;
}

AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(const char*, const char*, const char* file, uint32_t line,
                                                   TorchLibraryHandle* library) {
  return __real_aoti_torch_library_init_impl("paged_emulated", "CPU", file, line, library);
}

AOTITorchError __real_torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t);
AOTITorchError __wrap_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack, uint64_t abi) {
  const AOTITorchError error = __real_torch_call_dispatcher(op, overload, stack, abi);
  if (error == AOTI_TORCH_SUCCESS) after_dispatch(op, stack);
  return error;
}
AOTITorchError __real_aoti_torch_call_dispatcher(const char*, const char*, StableIValue*);
AOTITorchError __wrap_aoti_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack) {
  const AOTITorchError error = __real_aoti_torch_call_dispatcher(op, overload, stack);
  if (error == AOTI_TORCH_SUCCESS) after_dispatch(op, stack);
  return error;
}
AOTITorchError __real_aoti_torch_aten_new_empty(AtenTensorHandle, const int64_t*, int64_t, int32_t*, int32_t*, int32_t*,
                                                int32_t, int32_t*, AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_aten_new_empty(AtenTensorHandle like, const int64_t* sizes, int64_t dim,
                                                int32_t* dtype, int32_t* layout, int32_t* device, int32_t device_index,
                                                int32_t* pin_memory, AtenTensorHandle* result) {
  const AOTITorchError error =
      __real_aoti_torch_aten_new_empty(like, sizes, dim, dtype, layout, device, device_index, pin_memory, result);
  if (error == AOTI_TORCH_SUCCESS) allocated(*result, false);
  return error;
}

// A CPU has no current device and no stream.
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = kTorchStream;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error ? strdup(("CUDA error " + std::to_string(error) + " of the emulated runtime").c_str()) : nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

}  // extern "C"
