// paged::cpu_instruction_sets and paged::cpu_instruction_set: what a bug report needs to know.
#include <torch/csrc/stable/library.h>

#include "dispatch.h"

namespace paged {
namespace {

std::string cpu_instruction_sets() { return supported_instruction_sets(); }
std::string cpu_instruction_set() { return cpu_kernels().name; }

}  // namespace
}  // namespace paged

STABLE_TORCH_LIBRARY_IMPL(paged, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&paged::cpu_instruction_sets));
  m.impl("cpu_instruction_set", TORCH_BOX(&paged::cpu_instruction_set));
}
