// Divides one attention call into pieces of equal cost per thread, ahead of time.
#pragma once

#include <vector>

#include "attention_work.h"

namespace paged {

struct AttentionPlan {
  std::vector<AttentionWork> work;
  std::vector<int64_t> thread_begin;  // thread t works on [thread_begin[t], thread_begin[t + 1])
  struct Merge {
    int64_t first, count;  // pieces of the same rows, neighbours in `work`
  };
  std::vector<Merge> merges;
  int64_t partial_floats;  // room for all partial results

  int64_t num_threads() const { return int64_t(thread_begin.size()) - 1; }
};

struct SplitPolicy {
  int64_t num_threads;
  int64_t num_splits;             // pieces that a row's keys are cut into; 0: as many as balance the threads
  bool deterministic;             // where keys are cut depends on nothing but the row's own sequence
  int64_t element_size;           // bytes
  int64_t prefill_rows;           // most rows of a piece
  double bytes_per_multiply_add;  // of prefill
};

// Overwrites `plan`, reusing its memory.
void plan_attention(const AttentionCall& call, const SplitPolicy& policy, AttentionPlan& plan);

}  // namespace paged
