// Runs the ops that another process asks for: reads calls from stdin, writes results to stdout.
//
// Numbers are 8 bytes, little-endian; bytes follow their count. A call: name, threads, memories, arguments, outputs'
// kinds. A result: 1 and the memories as the op left them and the outputs, or 0 and the text of the error.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "torch_stub.h"

namespace {

enum Kind : int64_t { kNone, kInteger, kReal, kTensor, kTensors, kString };

void read_all(void* to, size_t count) {
  // Nothing more to do where the other process is gone.
  if (std::fread(to, 1, count, stdin) != count) std::exit(0);
}
template <class T = int64_t>
T read() {
  T value;
  read_all(&value, sizeof value);
  return value;
}
std::vector<int64_t> read_numbers(int64_t count) {
  std::vector<int64_t> numbers(count);
  read_all(numbers.data(), count * sizeof(int64_t));
  return numbers;
}

void write(int64_t number) { std::fwrite(&number, sizeof number, 1, stdout); }
void write(const void* bytes, int64_t count) {
  write(count);
  std::fwrite(bytes, 1, count, stdout);
}
void write(const std::string& text) { write(text.data(), int64_t(text.size())); }

std::string read_string() {
  std::string text(read(), 0);
  read_all(text.data(), text.size());
  return text;
}

struct Memory {
  std::shared_ptr<char> bytes;
  int64_t size;
};

Memory read_memory() {
  const int64_t size = read();
  const Memory memory{stub::allocate(size), size};
  read_all(memory.bytes.get(), size);
  return memory;
}

StableIValue read_tensor(const std::vector<Memory>& memories) {
  stub::Tensor tensor;
  tensor.dtype = read();
  tensor.element_size = int64_t(aoti_torch_dtype_element_size(int32_t(tensor.dtype)));
  tensor.memory = memories.at(read()).bytes;
  tensor.data = tensor.memory.get() + read() * tensor.element_size;
  const int64_t dim = read();
  tensor.sizes = read_numbers(dim);
  tensor.strides = read_numbers(dim);
  return reinterpret_cast<StableIValue>(tensor.handle());
}

StableIValue read_argument(const std::vector<Memory>& memories) {
  const bool is_optional = read();
  StableIValue value = 0;
  switch (const int64_t kind = read()) {
    case kNone: return 0;
    case kInteger:
    case kReal: value = read<StableIValue>(); break;
    case kTensor: value = read_tensor(memories); break;
    case kTensors: {
      std::vector<StableIValue> items(read());
      for (StableIValue& item : items) item = read_tensor(memories);
      value = stub::to_list(items);
      break;
    }
    case kString: value = stub::to_string(read_string()); break;
    default: throw std::logic_error("unknown kind " + std::to_string(kind));
  }
  return is_optional ? reinterpret_cast<StableIValue>(new StableIValue(value)) : value;
}

void write_output(int64_t kind, StableIValue value) {
  if (kind == kString) return write(stub::take_string(value));
  const std::unique_ptr<stub::Tensor> tensor(reinterpret_cast<stub::Tensor*>(value));
  write(tensor->dtype);
  write(tensor->sizes.data(), int64_t(tensor->sizes.size() * sizeof(int64_t)));
  write(tensor->data, tensor->numel() * tensor->element_size);
}

void serve() {
  const std::string name = read_string();
  stub::set_num_threads(read());
  std::vector<Memory> memories(read());
  for (Memory& memory : memories) memory = read_memory();
  const int64_t num_arguments = read();
  std::vector<StableIValue> stack;
  for (int64_t i = 0; i < num_arguments; ++i) stack.push_back(read_argument(memories));
  const std::vector<int64_t> outputs = read_numbers(read());
  stack.resize(std::max(stack.size(), outputs.size()));
  try {
    const stub::BoxedKernel kernel = stub::kernel_of(name);
    if (!kernel) throw std::runtime_error("no kernel of " + name);
    kernel(stack.data(), num_arguments, outputs.size());
  } catch (const std::exception& error) {
    write(0);
    write(std::string(error.what()));
    return;
  }
  write(1);
  for (const Memory& memory : memories) write(memory.bytes.get(), memory.size);
  for (size_t i = 0; i < outputs.size(); ++i) write_output(outputs[i], stack[i]);
}

}  // namespace

int main() {
  for (;;) {
    serve();
    std::fflush(stdout);
  }
}
