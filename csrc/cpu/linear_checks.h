// What the ops of linear layers check alike.
#pragma once

#include "../op_views.h"

namespace paged {

inline void check_linear_input(const Arg& rows) {
  check_dim(rows, 2, "[rows, in_features]");
  check_dtype(rows, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_last_dim_contiguous(rows);
}

inline void check_linear_bias(const std::optional<Tensor>& bias, const char* name, const Arg& rows,
                              int64_t out_features) {
  if (!bias) return;
  const Arg added{*bias, name};
  check_dim(added, 1, "[out_features]");
  check_same_dtype(added, rows);
  check_same_device(added, rows);
  check_size(added, 0, out_features, "out_features");
  check_contiguous(added);
}

}  // namespace paged
