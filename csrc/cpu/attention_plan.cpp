// Divides one attention call into pieces of equal cost per thread, ahead of time.
#include "attention_plan.h"

#include <algorithm>

namespace paged {
namespace {

constexpr int64_t kFixedSplit = 2048;         // keys per piece when the split must not depend on the batch
constexpr int64_t kSmallestPiece = 256;       // keys; a shorter piece costs more to merge than it balances
constexpr double kSmallestShare = 64 * 1024;  // cost for which a further thread is worth waking
constexpr double kBytesPerPiece = 4096;       // to begin and end a piece

struct Cost {
  double element_size, width, prefill_multiply_add;

  double per_key(const AttentionWork& work) const {
    const int64_t rows = rows_of(work);
    return width * (element_size + (rows > kDecodeRows ? prefill_multiply_add : kBytesPerMultiplyAdd) * double(rows));
  }
  double of(const AttentionWork& work) const {
    return kBytesPerPiece + double(work.key_end - work.key_begin) * per_key(work);
  }
};

// Few enough that each thread gets a piece, but where that must not depend on the threads.
int64_t rows_of_piece(const AttentionCall& call, const SplitPolicy& policy) {
  constexpr int64_t kFixedRows = 256;
  if (policy.deterministic || policy.num_splits > 0) return std::min(policy.prefill_rows, kFixedRows);
  const int64_t share = call.num_tokens * call.num_heads / policy.num_threads;
  return std::clamp((share + kPrefillRows - 1) / kPrefillRows * kPrefillRows, kPrefillRows, policy.prefill_rows);
}

// Every row of the call, in pieces whose keys are not split yet.
void list_pieces(const AttentionCall& call, int64_t most_rows, std::vector<AttentionWork>& pieces) {
  const int64_t group = call.num_heads / call.num_kv_heads;
  pieces.clear();
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t queries = call.cu_seqlens_q[seq + 1] - call.cu_seqlens_q[seq];
    const int64_t seq_len = call.seq_lens[seq];
    const int64_t heads = std::min(group, most_rows);
    const int64_t step = most_rows / heads;
    for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head)
      for (int64_t head = 0; head < group; head += heads)
        for (int64_t query = 0; query < queries; query += step) {
          const int64_t count = std::min(step, queries - query);
          const KeyRange keys = visible_keys(call, seq_len - queries + query, count, seq_len);
          pieces.push_back({seq, kv_head, kv_head * group + head, std::min(heads, group - head), query, count,
                            keys.begin, keys.end, -1});
        }
  }
}

// Appends pieces to the plan, thread after thread.
class Assignment {
 public:
  Assignment(const AttentionCall& call, AttentionPlan& plan) : v_head_dim_(call.v_head_dim), plan_(plan) {
    plan.thread_begin.assign(1, 0);
    plan.merges.clear();
    plan.partial_floats = 0;
  }

  // A piece is cut into neighbours by adding them one after the other with `cut` set, `first` for the first of them.
  void add(AttentionWork work, bool cut, bool first) {
    if (cut) {
      if (first) plan_.merges.push_back({int64_t(plan_.work.size()), 0});
      ++plan_.merges.back().count;
      work.partial = plan_.partial_floats;
      plan_.partial_floats += partial_floats(rows_of(work), v_head_dim_);
    }
    plan_.work.push_back(work);
  }
  void next_thread() { plan_.thread_begin.push_back(int64_t(plan_.work.size())); }
  int64_t thread() const { return plan_.num_threads(); }

 private:
  int64_t v_head_dim_;
  AttentionPlan& plan_;
};

// Cuts pieces just where one thread's share ends and the next begins.
void split_by_share(const std::vector<AttentionWork>& pieces, const Cost& cost, double total, int64_t num_threads,
                    Assignment& assignment) {
  double done = 0;
  const auto share_end = [&] { return total * double(assignment.thread() + 1) / double(num_threads); };
  for (const AttentionWork& piece : pieces) {
    AttentionWork rest = piece;
    bool cut = false;
    while (assignment.thread() < num_threads - 1 && done + cost.of(rest) > share_end()) {
      const int64_t fitting = std::max<int64_t>(0, int64_t((share_end() - done) / cost.per_key(rest)));
      const int64_t keys = fitting / kTileKeys * kTileKeys;
      const int64_t left = rest.key_end - rest.key_begin - keys;
      if (left < kSmallestPiece) break;
      if (keys >= kSmallestPiece) {
        AttentionWork part = rest;
        part.key_end = rest.key_begin = rest.key_begin + keys;
        assignment.add(part, true, !cut);
        done += cost.per_key(part) * double(keys);
        cut = true;
      }
      assignment.next_thread();
    }
    assignment.add(rest, cut, false);
    done += cost.of(rest);
    while (assignment.thread() < num_threads - 1 && done >= share_end()) assignment.next_thread();
  }
}

// Cuts pieces at given distances, wherever the threads' shares end.
void split_by_length(const std::vector<AttentionWork>& pieces, const SplitPolicy& policy, const Cost& cost,
                     double total, int64_t num_threads, Assignment& assignment) {
  double done = 0;
  for (const AttentionWork& piece : pieces) {
    const int64_t keys = piece.key_end - piece.key_begin;
    int64_t length = kFixedSplit;
    if (policy.num_splits > 0) {
      length = keys / policy.num_splits + (keys % policy.num_splits != 0);
      length = std::max(kTileKeys, (length + kTileKeys - 1) / kTileKeys * kTileKeys);
    }
    AttentionWork part = piece;
    do {
      part.key_end = std::min(part.key_begin + length, piece.key_end);
      while (assignment.thread() < num_threads - 1 &&
             done + cost.of(part) / 2 > total * double(assignment.thread() + 1) / double(num_threads))
        assignment.next_thread();
      assignment.add(part, keys > length, part.key_begin == piece.key_begin);
      done += cost.of(part);
      part.key_begin = part.key_end;
    } while (part.key_begin < piece.key_end);
  }
}

}  // namespace

void plan_attention(const AttentionCall& call, const SplitPolicy& policy, AttentionPlan& plan) {
  static thread_local std::vector<AttentionWork> pieces;
  list_pieces(call, rows_of_piece(call, policy), pieces);
  const Cost cost{double(policy.element_size), double(call.head_dim + call.v_head_dim), policy.bytes_per_multiply_add};
  double total = 0;
  for (const AttentionWork& piece : pieces) total += cost.of(piece);
  const int64_t num_threads = std::max<int64_t>(1, std::min(policy.num_threads, int64_t(total / kSmallestShare)));

  plan.work.clear();
  Assignment assignment(call, plan);
  if (policy.num_splits > 0 || policy.deterministic)
    split_by_length(pieces, policy, cost, total, num_threads, assignment);
  else
    split_by_share(pieces, cost, total, num_threads, assignment);
  while (assignment.thread() < num_threads) assignment.next_thread();
}

}  // namespace paged
