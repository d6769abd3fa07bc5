// What each op demands of the values of tables, lengths, slots and scales; all pointers are the host's.
#pragma once

#include <cmath>
#include <optional>

#include "attention_call.h"
#include "cache_calls.h"
#include "checks.h"
#include "id_set.h"

namespace paged {

inline void check_divisors(const char* name, const std::optional<Tensor>& scale) {
  if (!scale) return;
  const float* values = scale->const_data_ptr<float>();
  for (int64_t i = 0; i < scale->numel(); ++i)
    if (!std::isfinite(values[i]) || values[i] == 0)
      reject(name, text("value ", values[i], " at [", i, "]"),
             "finite and not 0, as keys and values are divided by it");
}

inline void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
  bool ascending = true;
  int64_t last = -1;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots[t] < -1 || slots[t] >= num_slots)
      reject("slot_mapping", text("value ", slots[t], " at [", t, "]"),
             text("in [-1, ", num_slots, ") (num_blocks * block_size)"));
    if (slots[t] < 0) continue;
    ascending = ascending && slots[t] > last;
    last = slots[t];
  }
  if (ascending) return;
  IdSet seen(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t)
    if (slots[t] >= 0 && !seen.insert(slots[t]))
      reject("slot_mapping", text("value ", slots[t], " at [", t, "] and before"), "no slot twice");
}

// Every source is a block of `src` and every destination one of `dst`.
inline void check_block_ranges(const int64_t* pairs, int64_t num_pairs, int64_t src_blocks, int64_t dst_blocks) {
  for (int64_t i = 0; i < num_pairs; ++i)
    for (int side = 0; side < 2; ++side) {
      const int64_t id = pairs[2 * i + side], num_blocks = side ? dst_blocks : src_blocks;
      if (id < 0 || id >= num_blocks)
        reject("block_mapping", text("value ", id, " at [", i, ", ", side, "]"),
               text("in [0, ", num_blocks, ") (num_blocks)"));
    }
}

// Call after check_block_ranges: the set takes no negative id.
inline void check_destinations(const int64_t* pairs, int64_t num_pairs, bool sources_are_destinations) {
  IdSet destinations(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i)
    if (!destinations.insert(pairs[2 * i + 1]))
      reject("block_mapping", text("destination ", pairs[2 * i + 1], " at [", i, ", 1] and before"),
             "no destination twice");
  for (int64_t i = 0; sources_are_destinations && i < num_pairs; ++i)
    if (destinations.contains(pairs[2 * i]))
      reject("block_mapping", text("source ", pairs[2 * i], " at [", i, ", 0] is a destination too"),
             "no block on both sides");
}

inline void check_positions(const AttentionCall& call, int64_t num_blocks, int64_t max_blocks, int64_t max_query_len) {
  check_cu_seqlens(call.cu_seqlens_q, call.num_seqs, call.num_tokens, max_query_len);
  check_seq_lens(call.seq_lens, call.num_seqs, max_blocks, call.block_size);
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t count = call.cu_seqlens_q[s + 1] - call.cu_seqlens_q[s];
    const int64_t seq_len = call.seq_lens[s];
    const KeyRange keys = visible_keys(call, seq_len - count, count, seq_len);
    if (keys.begin < keys.end)
      check_block_ids(call.block_table + s * call.table_stride, s, keys.begin / call.block_size,
                      (keys.end - 1) / call.block_size + 1, num_blocks);
  }
}

// Tables that gather_cache reads.
inline void check_sequences(const SequenceTable& table, int64_t max_blocks, int64_t block_size, int64_t num_blocks,
                            int64_t max_seq_len) {
  check_seq_lens(table.seq_lens, table.num_seqs, max_blocks, block_size);
  for (int64_t s = 0; s < table.num_seqs; ++s) {
    if (table.seq_lens[s] > max_seq_len)
      reject("max_seq_len", text(max_seq_len), text("at least ", table.seq_lens[s], ", the length of sequence ", s));
    check_block_ids(table.block_table + s * table.row_stride, s, 0,
                    (int64_t(table.seq_lens[s]) + block_size - 1) / block_size, num_blocks);
  }
}

}  // namespace paged
