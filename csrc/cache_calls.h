// What the ops that move cached rows and blocks read and write: pointers, sizes and strides, never tensors.
#pragma once

#include <cstdint>

namespace paged {

// Strides count elements. `Byte` is `char` where the cache is written, `const char` where it is read.
template <class Byte>
struct CacheView {
  Byte* data;
  int64_t block_stride, token_stride, head_stride, dim_stride;
};

// What the elements are. Bytes of some size are moved as they are; numbers can be scaled on the way.
enum class Element { kBytes1, kBytes2, kBytes4, kBytes8, kBytes16, kFloat32, kFloat64, kBFloat16, kFloat16 };

// A factor per KV head, or one for all with stride 0; no pointer means 1.
struct Scale {
  const float* data = nullptr;
  int64_t stride = 0;
};

// Dense rows `[tokens, num_kv_heads, head_dim]`, strides in elements, head_dim contiguous.
struct NewRows {
  const char* data;
  int64_t token_stride, head_stride;
};

struct CacheWrite {
  NewRows rows;
  CacheView<char> cache;
  Scale scale;  // what is stored is the row divided by it
  Element element;
  int64_t element_size;
  int64_t num_tokens, num_kv_heads, head_dim, block_size;
};

// `cos` and `sin`, rows `[tokens, rotary_dim]`, strides in elements, rotary_dim contiguous.
struct Angles {
  const char *cos, *sin;
  int64_t cos_stride, sin_stride;
  Element element;  // float32, or what the rows are
  int64_t rotary_dim;
  bool interleaved;  // elements 2i and 2i + 1 are one pair; else i and i + rotary_dim / 2
};

// `key.element` is one of the number types, and what all rows are. `rotated` is contiguous.
struct RopeWrite {
  NewRows query;
  char* rotated;  // `[tokens, num_heads, head_dim]`
  int64_t num_heads;
  Angles angles;
  CacheWrite key, value;
};

struct CacheRead {
  CacheView<const char> cache;
  char* rows;   // `[num_seqs, max_seq_len, num_kv_heads, head_dim]`, contiguous
  Scale scale;  // what is returned is the cache times it
  Element element;
  int64_t element_size;
  int64_t num_kv_heads, head_dim, block_size, max_seq_len;
};

// `[num_seqs]` lengths and a table of `[num_seqs, ..]` rows at `row_stride` elements.
struct SequenceTable {
  const int32_t* block_table;
  int64_t row_stride;
  const int32_t* seq_lens;
  int64_t num_seqs;
};

// `out [tokens, num_heads, head_dim]`, head_dim contiguous, and `lse [num_heads, tokens]`; strides in elements.
struct AttentionState {
  const char* out;
  int64_t token_stride, head_stride;
  const float* lse;
  int64_t lse_head_stride, lse_token_stride;
};

// Results are contiguous. `element` is one of the number types.
struct StateMerge {
  AttentionState a, b;
  char* out;
  float* lse;
  Element element;
  int64_t element_size;
  int64_t num_tokens, num_heads, head_dim;
};

// One layer; dimensions are num_blocks, block_size, num_kv_heads, head_dim. Strides in bytes.
struct LayerCopy {
  const char* src;
  char* dst;
  int64_t sizes[4];
  int64_t src_strides[4];
  int64_t dst_strides[4];
  int64_t element_size;
};

// A block as up to three nested loops around one memcpy.
struct BlockLoops {
  int64_t sizes[3] = {1, 1, 1};
  int64_t src_strides[3] = {};
  int64_t dst_strides[3] = {};
  int64_t run_bytes = 0;
};

}  // namespace paged
