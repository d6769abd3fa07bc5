// Chooses one of the compiled instruction sets at run time.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#define PAGED_DECLARE_ATTENTION(dtype)                                                                 \
  void attention_decode_##dtype(const AttentionCall&, const AttentionWork&, float*, float*);           \
  void attention_prefill_##dtype(const AttentionCall&, const AttentionWork&, float*, float*);          \
  void attention_merge_##dtype(const AttentionCall&, const AttentionWork*, int64_t, float*);           \
  constexpr AttentionKernels attention_##dtype = {attention_decode_##dtype, attention_prefill_##dtype, \
                                                  attention_merge_##dtype};

#define PAGED_INSTRUCTION_SET(isa)  \
  namespace paged::isa {            \
  PAGED_DECLARE_ATTENTION(float32)  \
  PAGED_DECLARE_ATTENTION(bfloat16) \
  PAGED_DECLARE_ATTENTION(float16)  \
  cpu::StoreTokens store_tokens;    \
  cpu::RotateTokens rotate_tokens;  \
  cpu::LoadBlocks load_blocks;      \
  cpu::CopyBlock copy_block;        \
  cpu::MergeStates merge_states;    \
  }

#define PAGED_KERNELS(isa, machine_has_it)                                                                            \
  CpuKernels {                                                                                                        \
    #isa, machine_has_it, isa::attention_float32, isa::attention_bfloat16, isa::attention_float16, isa::store_tokens, \
        isa::rotate_tokens, isa::load_blocks, isa::copy_block, isa::merge_states                                      \
  }

#if defined(__aarch64__)
PAGED_INSTRUCTION_SET(neon)
#else
PAGED_INSTRUCTION_SET(baseline)
#endif
#if defined(__x86_64__)
PAGED_INSTRUCTION_SET(avx2)
PAGED_INSTRUCTION_SET(avx512)
PAGED_INSTRUCTION_SET(avx512bf16)
#endif

namespace paged {
namespace {

// From the slowest to the fastest.
constexpr CpuKernels kInstructionSets[] = {
#if defined(__aarch64__)
    PAGED_KERNELS(neon, [] { return true; }),
#else
    PAGED_KERNELS(baseline, [] { return true; }),
#endif
#if defined(__x86_64__)
    PAGED_KERNELS(avx2, [] { return bool(__builtin_cpu_supports("x86-64-v3")); }),
    PAGED_KERNELS(avx512, [] { return bool(__builtin_cpu_supports("x86-64-v4")); }),
    PAGED_KERNELS(avx512bf16,
                  [] { return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"); }),
#endif
};

const CpuKernels& choose() {
  const char* wanted = std::getenv("TORCH_PAGED_CPU_ISA");
  const CpuKernels* best = nullptr;
  for (const CpuKernels& set : kInstructionSets)
    if (set.machine_has_it() && (!wanted || !*wanted || std::string(wanted) == set.name)) best = &set;
  if (!best)
    throw std::runtime_error("TORCH_PAGED_CPU_ISA: " + std::string(wanted) + "; must be one of " +
                             supported_instruction_sets() + " on this machine, or unset");
  return *best;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

std::string supported_instruction_sets() {
  std::string names;
  for (const CpuKernels& set : kInstructionSets)
    if (set.machine_has_it()) names += (names.empty() ? "" : ",") + std::string(set.name);
  return names;
}

}  // namespace paged
