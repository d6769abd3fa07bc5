// Where the rows of a tile of keys lie in the cache, and their copy into packed rows.
#pragma once

#include "../attention_work.h"
#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

// Pointers to the cached rows of keys [first, first + count) of one sequence and KV head. No other entry of the block
// table is read.
template <class T>
void find_rows(const AttentionCall& call, const AttentionWork& work, const void* cache, const CacheStrides& strides,
               int64_t first, int64_t count, const T** rows) {
  const int32_t* blocks = call.block_table + work.seq * call.table_stride;
  const T* head = static_cast<const T*>(cache) + work.kv_head * strides.head;
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(call.block_size));
  for (int64_t i = 0; i < count;) {
    const int64_t key = first + i, offset = key & (call.block_size - 1);
    const T* row = head + int64_t(blocks[key >> shift]) * strides.block + offset * strides.token;
    const int64_t left = call.block_size - offset, end = i + (left < count - i ? left : count - i);
    for (; i < end; ++i, row += strides.token) rows[i] = row;
  }
}

// Elements [d, d + kChunk) of a row, zero past `size`; `stride` is not 1 where a page is kept transposed.
template <class T>
PAGED_INLINE Chunk gather_chunk(const T* row, int64_t d, int64_t size, int64_t stride) {
  if (stride == 1) return load_chunk(row + d, size - d);
  T padded[kChunk] = {};
  for (int64_t i = 0; i < kChunk && d + i < size; ++i) padded[i] = row[(d + i) * stride];
  return load_chunk(padded);
}

PAGED_INLINE IntVec not_finite(Vec v) { return (IntVec)(((BitVec)v & 0x7f800000) == 0x7f800000); }

PAGED_INLINE bool any(IntVec v) {
  int32_t lanes[kLanes], some = 0;
  store_as(lanes, v);
  for (int32_t lane : lanes) some |= lane;
  return some != 0;
}

}  // namespace
}  // namespace paged::PAGED_ISA
