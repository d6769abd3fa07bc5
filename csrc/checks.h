// Checks of tensor arguments, each failure worded `<argument>: <what it is>; must be <what it must be>`.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace paged {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An argument of an op under the name its caller knows; `index` counts within a list argument.
struct Arg {
  const Tensor& tensor;
  const char* name;
  int64_t index = -1;

  int64_t size(int64_t dim) const { return tensor.size(dim); }
  int64_t stride(int64_t dim) const { return tensor.stride(dim); }
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string name_of(const Arg& arg) {
  return arg.index < 0 ? std::string(arg.name) : text(arg.name, "[", arg.index, "]");
}

// A plain exception, because TORCH_CHECK's would put the C++ location into the text.
[[noreturn]] inline void reject(const std::string& argument, const std::string& is, const std::string& must_be) {
  throw std::runtime_error(text(argument, ": ", is, "; must be ", must_be));
}

[[noreturn]] inline void reject(const Arg& arg, const std::string& is, const std::string& must_be) {
  reject(name_of(arg), is, must_be);
}

inline void check_at_least_0(const char* name, int64_t value) {
  if (value < 0) reject(name, text(value), "at least 0");
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  if (device.is_cpu()) return "cpu";
  if (device.is_cuda()) return text("cuda:", device.index());
  return text("device type ", int(device.type()));
}

inline std::string brackets(const int64_t* values, int64_t count) {
  std::string out = "[";
  for (int64_t i = 0; i < count; ++i) out += text(i ? ", " : "", values[i]);
  return out + "]";
}

inline std::string shape_of(const Tensor& tensor) { return brackets(tensor.sizes().data(), tensor.dim()); }
inline std::string strides_of(const Tensor& tensor) { return brackets(tensor.strides().data(), tensor.dim()); }

// `layout` names the dimensions: "[tokens, heads, head_dim]".
inline void check_dim(const Arg& arg, int64_t dim, const char* layout) {
  if (arg.tensor.dim() != dim) reject(arg, text("shape ", shape_of(arg.tensor)), text(dim, "-D ", layout));
}

// `what` says where the expected size comes from: "num_blocks of key_cache".
inline void check_size(const Arg& arg, int64_t dim, int64_t expected, const char* what) {
  if (arg.size(dim) != expected)
    reject(arg, text("size ", arg.size(dim), " in dimension ", dim), text(expected, " (", what, ")"));
}

inline void check_dtype(const Arg& arg, std::initializer_list<ScalarType> allowed) {
  const ScalarType dtype = arg.tensor.scalar_type();
  std::string names;
  for (ScalarType one : allowed) {
    if (dtype == one) return;
    names += (names.empty() ? "" : " or ") + dtype_name(one);
  }
  reject(arg, dtype_name(dtype), names);
}

inline void check_floating(const Arg& arg) {
  check_dtype(arg, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
}

inline void check_same_dtype(const Arg& arg, const Arg& like) {
  if (arg.tensor.scalar_type() != like.tensor.scalar_type())
    reject(arg, dtype_name(arg.tensor.scalar_type()),
           text(dtype_name(like.tensor.scalar_type()), ", like ", name_of(like)));
}

inline void check_same_device(const Arg& arg, const Arg& like) {
  if (!(arg.tensor.device() == like.tensor.device()))
    reject(arg, text("on ", device_name(arg.tensor)), text("on ", device_name(like.tensor), ", like ", name_of(like)));
}

inline void check_contiguous(const Arg& arg) {
  if (!arg.tensor.is_contiguous()) reject(arg, text("strides ", strides_of(arg.tensor)), "contiguous");
}

// A dimension of size 1 has no stride to speak of, nor has any dimension of an empty tensor.
inline bool strides_matter(const Arg& arg, int64_t dim) { return arg.size(dim) > 1 && arg.tensor.numel() > 0; }

inline void check_last_dim_contiguous(const Arg& arg) {
  const int64_t last = arg.tensor.dim() - 1;
  if (strides_matter(arg, last) && arg.stride(last) != 1)
    reject(arg, text("strides ", strides_of(arg.tensor)), "contiguous in the last dimension");
}

// A tensor that is written needs an element of its own for every index.
inline void check_not_expanded(const Arg& arg) {
  for (int64_t dim = 0; dim < arg.tensor.dim(); ++dim)
    if (strides_matter(arg, dim) && arg.stride(dim) == 0)
      reject(arg, text("expanded, strides ", strides_of(arg.tensor)), "free of overlapping elements, as it is written");
}

// True where each token's head vector is contiguous; otherwise a K page is kept transposed, with token stride 1.
inline bool is_token_major(const Arg& cache) { return !strides_matter(cache, 3) || cache.stride(3) == 1; }

// One layer's caches, `[num_blocks, block_size, num_kv_heads, head_dim]`, in one of the two stride families.
inline void check_caches(const Arg& key_cache, const Arg& value_cache) {
  check_dim(key_cache, 4, "[num_blocks, block_size, num_kv_heads, head_dim]");
  check_dim(value_cache, 4, "[num_blocks, block_size, num_kv_heads, v_head_dim]");
  check_same_dtype(value_cache, key_cache);
  check_same_device(value_cache, key_cache);
  check_size(value_cache, 0, key_cache.size(0), "num_blocks of key_cache");
  check_size(value_cache, 1, key_cache.size(1), "block_size of key_cache");
  check_size(value_cache, 2, key_cache.size(2), "num_kv_heads of key_cache");
  const int64_t block_size = key_cache.size(1);
  if (block_size < 1 || block_size > 256 || (block_size & (block_size - 1)))
    reject(key_cache, text("block_size ", block_size), "a power of two from 1 to 256");
  if (!is_token_major(key_cache) && strides_matter(key_cache, 1) && key_cache.stride(1) != 1)
    reject(key_cache, text("strides ", strides_of(key_cache.tensor)), "contiguous in head_dim or in block_size");
  check_last_dim_contiguous(value_cache);
  for (const Arg& cache : {key_cache, value_cache})
    if (cache.size(2) < 1 || cache.size(3) < 1)
      reject(cache, text("shape ", shape_of(cache.tensor)), "of at least one head and one element a head");
}

// A float32 `[1]` or `[num_kv_heads]` factor on what is stored.
inline void check_scale(const Arg& scale, const Arg& cache) {
  check_dim(scale, 1, "[1] or [num_kv_heads]");
  check_dtype(scale, {ScalarType::Float});
  check_same_device(scale, cache);
  if (scale.size(0) != 1 && scale.size(0) != cache.size(2))
    reject(scale, text("shape ", shape_of(scale.tensor)), text("[1] or [", cache.size(2), "] (num_kv_heads)"));
  check_contiguous(scale);
}

// `block_table [num_seqs, max_blocks]`, rows at a free stride, and `seq_lens [num_seqs]`.
inline void check_tables(const Arg& block_table, const Arg& seq_lens, const Arg& key_cache) {
  check_dim(block_table, 2, "[num_seqs, max_blocks]");
  check_dtype(block_table, {ScalarType::Int});
  check_same_device(block_table, key_cache);
  check_last_dim_contiguous(block_table);
  check_dim(seq_lens, 1, "[num_seqs]");
  check_dtype(seq_lens, {ScalarType::Int});
  check_same_device(seq_lens, key_cache);
  check_size(seq_lens, 0, block_table.size(0), "num_seqs of block_table");
  check_contiguous(seq_lens);
}

// The checks below read values, so they are for tensors on the host.

inline void check_seq_lens(const int32_t* seq_lens, int64_t num_seqs, int64_t max_blocks, int64_t block_size) {
  for (int64_t s = 0; s < num_seqs; ++s)
    if (seq_lens[s] < 0 || seq_lens[s] > max_blocks * block_size)
      reject("seq_lens", text("value ", seq_lens[s], " at [", s, "]"),
             text("in [0, ", max_blocks * block_size, "] (max_blocks * block_size)"));
}

// Entries [first, last) of one row of the block table, the ones that will be read.
inline void check_block_ids(const int32_t* row, int64_t s, int64_t first, int64_t last, int64_t num_blocks) {
  for (int64_t i = first; i < last; ++i)
    if (row[i] < 0 || row[i] >= num_blocks)
      reject("block_table", text("value ", row[i], " at [", s, ", ", i, "]"),
             text("in [0, ", num_blocks, ") (num_blocks), as seq_lens needs this entry"));
}

// `cu_seqlens_q` starts at 0, never falls, ends at `num_tokens`, and no row has more than `max_query_len` tokens.
inline void check_cu_seqlens(const int32_t* cu_seqlens, int64_t num_seqs, int64_t num_tokens, int64_t max_query_len) {
  if (cu_seqlens[0] != 0) reject("cu_seqlens_q", text("value ", cu_seqlens[0], " at [0]"), "0");
  for (int64_t s = 0; s < num_seqs; ++s) {
    const int64_t length = int64_t(cu_seqlens[s + 1]) - cu_seqlens[s];
    if (length < 0)
      reject("cu_seqlens_q", text("value ", cu_seqlens[s + 1], " at [", s + 1, "]"),
             text("at least ", cu_seqlens[s], ", the value before it"));
    if (length > max_query_len)
      reject("max_query_len", text(max_query_len), text("at least ", length, ", the query tokens of sequence ", s));
  }
  if (cu_seqlens[num_seqs] != num_tokens)
    reject("cu_seqlens_q", text("value ", cu_seqlens[num_seqs], " at [", num_seqs, "]"),
           text(num_tokens, " (tokens of query)"));
}

}  // namespace paged
