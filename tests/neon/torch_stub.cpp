// Stands in for libtorch where there is none: as much of its stable C ABI as the CPU kernels call, over plain memory.
#include "torch_stub.h"

#include <algorithm>
#include <cstdlib>
#include <map>

namespace stub {
namespace {

struct List {
  std::vector<StableIValue> items;
};

std::map<std::string, BoxedKernel>& kernels() {
  static std::map<std::string, BoxedKernel> all;
  return all;
}

int64_t threads = 1;

Tensor* of(AtenTensorHandle handle) { return reinterpret_cast<Tensor*>(handle); }
List* of(StableListHandle handle) { return reinterpret_cast<List*>(handle); }

template <class T>
T as(StableIValue value) {
  return reinterpret_cast<T>(value);
}

// The arguments of aten::new_empty are tensor, sizes, dtype and what only other devices know.
AtenTensorHandle new_empty(StableIValue* stack) {
  const std::unique_ptr<Tensor> like(as<Tensor*>(stack[0]));
  const std::unique_ptr<List> sizes(as<List*>(stack[1]));
  const std::unique_ptr<StableIValue> dtype(as<StableIValue*>(stack[2]));
  Tensor out = *like;
  if (dtype) {
    out.dtype = int32_t(*dtype);
    out.element_size = int64_t(aoti_torch_dtype_element_size(int32_t(out.dtype)));
  }
  out.sizes.assign(sizes->items.begin(), sizes->items.end());
  out.strides.assign(out.sizes.size(), 1);
  for (size_t dim = out.sizes.size(); dim-- > 1;)
    out.strides[dim - 1] = out.strides[dim] * std::max<int64_t>(1, out.sizes[dim]);
  out.memory = allocate(out.numel() * out.element_size);
  out.data = out.memory.get();
  return out.handle();
}

}  // namespace

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

BoxedKernel kernel_of(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : found->second;
}

void set_num_threads(int64_t num_threads) { threads = num_threads; }

std::shared_ptr<char> allocate(int64_t bytes) {
  constexpr int64_t line = 64;  // torch aligns to it too
  return {static_cast<char*>(std::aligned_alloc(line, (bytes + line) / line * line)), std::free};
}

StableIValue to_list(const std::vector<StableIValue>& items) { return reinterpret_cast<StableIValue>(new List{items}); }

StableIValue to_string(const std::string& text) { return reinterpret_cast<StableIValue>(new std::string(text)); }

std::string take_string(StableIValue value) {
  const std::unique_ptr<std::string> owner(as<std::string*>(value));
  return *owner;
}

}  // namespace stub

using stub::of;

extern "C" {

#define PAGED_CONSTANTS(of_type)                                                                                       \
  of_type(dtype_uint8, 0) of_type(dtype_int8, 1) of_type(dtype_int16, 2) of_type(dtype_int32, 3)                       \
      of_type(dtype_int64, 4) of_type(dtype_float16, 5) of_type(dtype_float32, 6) of_type(dtype_float64, 7) of_type(   \
          dtype_complex32, 8) of_type(dtype_complex64, 9) of_type(dtype_complex128, 10) of_type(dtype_bool, 11)        \
          of_type(dtype_bfloat16, 15) of_type(dtype_float8_e5m2, 23) of_type(dtype_float8_e4m3fn, 24)                  \
              of_type(dtype_float8_e5m2fnuz, 25) of_type(dtype_float8_e4m3fnuz, 26) of_type(dtype_uint16, 27) of_type( \
                  dtype_uint32, 28) of_type(dtype_uint64, 29) of_type(device_type_cpu, 0) of_type(device_type_cuda, 1) \
                  of_type(device_type_xpu, 12) of_type(device_type_mps, 13) of_type(device_type_meta, 14)              \
                      of_type(device_type_privateuse1, 20) of_type(layout_strided, 0) of_type(layout_sparse_coo, 1)    \
                          of_type(layout_sparse_csr, 2) of_type(layout__mkldnn, 3) of_type(layout_sparse_csc, 4)       \
                              of_type(layout_sparse_bsr, 5) of_type(layout_sparse_bsc, 6) of_type(layout_jagged, 7)
#define PAGED_DEFINE(name, number) \
  int32_t aoti_torch_##name() { return number; }
PAGED_CONSTANTS(PAGED_DEFINE)
int32_t torch_dtype_float8_e8m0fnu() { return 44; }
int32_t torch_dtype_float4_e2m1fn_x2() { return 45; }

size_t aoti_torch_dtype_element_size(int32_t dtype) {
  switch (dtype) {
    case 2:
    case 5:
    case 15:
    case 27: return 2;
    case 3:
    case 6:
    case 8:
    case 28: return 4;
    case 4:
    case 7:
    case 9:
    case 29: return 8;
    case 10: return 16;
    default: return 1;
  }
}

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* library) {
  *library = nullptr;
  return 0;
}
int32_t aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
int32_t torch_library_impl(TorchLibraryHandle, const char* name, stub::BoxedKernel kernel, uint64_t) {
  stub::kernels()[name] = kernel;
  return 0;
}
int32_t torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  if (std::string(name) != "aten::new_empty") return 1;
  stack[0] = reinterpret_cast<StableIValue>(stub::new_empty(stack));
  return 0;
}

int32_t aoti_torch_new_uninitialized_tensor(AtenTensorHandle* tensor) {
  *tensor = stub::Tensor{}.handle();
  return 0;
}
int32_t aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* copy) {
  *copy = of(tensor)->handle();
  return 0;
}
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete of(tensor);
  return 0;
}
int32_t aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim) {
  *dim = int64_t(of(tensor)->sizes.size());
  return 0;
}
int32_t aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel) {
  *numel = of(tensor)->numel();
  return 0;
}
int32_t aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes) {
  *sizes = of(tensor)->sizes.data();
  return 0;
}
int32_t aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* size) {
  *size = of(tensor)->sizes.at(dim);
  return 0;
}
int32_t aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides) {
  *strides = of(tensor)->strides.data();
  return 0;
}
int32_t aoti_torch_get_stride(AtenTensorHandle tensor, int64_t dim, int64_t* stride) {
  *stride = of(tensor)->strides.at(dim);
  return 0;
}
int32_t aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype) {
  *dtype = int32_t(of(tensor)->dtype);
  return 0;
}
int32_t aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cpu();
  return 0;
}
int32_t aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = -1;
  return 0;
}
int32_t aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* is_contiguous) {
  *is_contiguous = true;
  int64_t stride = 1;
  for (size_t dim = of(tensor)->sizes.size(); dim-- > 0;) {
    const int64_t size = of(tensor)->sizes[dim];
    if (size != 1 && of(tensor)->strides[dim] != stride) *is_contiguous = false;
    stride *= size;
  }
  *is_contiguous = *is_contiguous || of(tensor)->numel() == 0;
  return 0;
}
int32_t torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  *data = of(tensor)->data;
  return 0;
}
int32_t torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = of(tensor)->data;
  return 0;
}
// Memory reserved here would be none of the process that calls.
int32_t torch_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                        AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*) {
  return 1;
}

int32_t torch_new_list_reserve_size(size_t, StableListHandle* list) {
  *list = reinterpret_cast<StableListHandle>(new stub::List);
  return 0;
}
int32_t torch_list_size(StableListHandle list, size_t* size) {
  *size = of(list)->items.size();
  return 0;
}
int32_t torch_list_get_item(StableListHandle list, size_t index, StableIValue* item) {
  *item = of(list)->items.at(index);
  return 0;
}
int32_t torch_list_push_back(StableListHandle list, StableIValue item) {
  of(list)->items.push_back(item);
  return 0;
}
int32_t torch_delete_list(StableListHandle list) {
  delete of(list);
  return 0;
}
int32_t torch_string_length(StringHandle text, size_t* length) {
  *length = reinterpret_cast<std::string*>(text)->size();
  return 0;
}
int32_t torch_string_c_str(StringHandle text, const char** data) {
  *data = reinterpret_cast<std::string*>(text)->c_str();
  return 0;
}
int32_t torch_delete_string(StringHandle text) {
  delete reinterpret_cast<std::string*>(text);
  return 0;
}
int32_t torch_new_string_handle(const char* data, size_t length, StringHandle* handle) {
  *handle = reinterpret_cast<StringHandle>(new std::string(data, length));
  return 0;
}

int32_t torch_get_num_threads(uint32_t* num_threads) {
  *num_threads = uint32_t(stub::threads);
  return 0;
}
// The shares that torch would give its threads, one after the other.
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context) {
  const int64_t share = std::max((end - begin + stub::threads - 1) / stub::threads, std::max<int64_t>(grain, 1));
  for (; begin < end; begin += share) function(begin, std::min(begin + share, end), context);
  return 0;
}

}  // extern "C"
