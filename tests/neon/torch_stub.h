// What the process that serves the ops needs of the stand-in for libtorch.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace stub {

// A view of memory that several tensors may share. `dtype` is a number of c10::ScalarType.
struct Tensor {
  int64_t dtype, element_size;
  std::vector<int64_t> sizes, strides;
  std::shared_ptr<char> memory;
  char* data;

  AtenTensorHandle handle() const { return reinterpret_cast<AtenTensorHandle>(new Tensor(*this)); }
  int64_t numel() const;
};

using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs);

// The kernel that a loaded library registered under this name, or null.
BoxedKernel kernel_of(const std::string& name);
void set_num_threads(int64_t num_threads);
std::shared_ptr<char> allocate(int64_t bytes);
StableIValue to_list(const std::vector<StableIValue>& items);
StableIValue to_string(const std::string& text);
std::string take_string(StableIValue value);

}  // namespace stub
