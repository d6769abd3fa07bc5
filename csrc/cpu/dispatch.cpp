// Chooses one of the compiled instruction sets at run time.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

#define PAGED_DECLARE_ATTENTION(dtype)                                                                             \
  void attention_decode_##dtype(const AttentionCall&, const AttentionWork*, int64_t, const AttentionWork*, float*, \
                                float*);                                                                           \
  void attention_prefill_##dtype(const AttentionCall&, const AttentionWork&, float*, float*);                      \
  void attention_merge_##dtype(const AttentionCall&, const AttentionWork*, int64_t, float*);                       \
  constexpr AttentionKernels attention_##dtype = {attention_decode_##dtype, attention_prefill_##dtype,             \
                                                  attention_merge_##dtype,  kPrefillRows,                          \
                                                  scratch_floats,           kBytesPerMultiplyAdd};

#define PAGED_INSTRUCTION_SET(isa)          \
  namespace paged::isa {                    \
  PAGED_DECLARE_ATTENTION(float32)          \
  PAGED_DECLARE_ATTENTION(bfloat16)         \
  PAGED_DECLARE_ATTENTION(float16)          \
  cpu::StoreTokens store_tokens;            \
  cpu::RotateTokens rotate_tokens;          \
  cpu::LoadBlocks load_blocks;              \
  cpu::CopyBlock copy_block;                \
  cpu::MergeStates merge_states;            \
  cpu::MultiplyPanels multiply_panels;      \
  cpu::MultiplyFewRows multiply_few_rows;   \
  cpu::MultiplyManyRows multiply_many_rows; \
  bool has_many_rows(const cpu::Linear&);   \
  cpu::NormaliseRows normalise_rows;        \
  }

#define PAGED_KERNELS(isa, machine_has_it, machine_likes_it)                                                         \
  CpuKernels {                                                                                                       \
    #isa, machine_has_it, machine_likes_it, isa::attention_float32, isa::attention_bfloat16, isa::attention_float16, \
        isa::store_tokens, isa::rotate_tokens, isa::load_blocks, isa::copy_block, isa::merge_states,                 \
        isa::multiply_panels,                                                                                        \
        {isa::has_many_rows, isa::multiply_few_rows, isa::multiply_many_rows, cpu::few_rows_scratch_floats,          \
         cpu::many_rows_scratch_floats},                                                                             \
        isa::normalise_rows                                                                                          \
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
namespace paged::amx {
void attention_decode_bfloat16(const AttentionCall&, const AttentionWork*, int64_t, const AttentionWork*, float*,
                               float*);
void attention_prefill_bfloat16(const AttentionCall&, const AttentionWork&, float*, float*);
cpu::MultiplyPanels multiply_panels;
bool has_many_rows(const cpu::Linear&);
cpu::MultiplyFewRows multiply_few_rows;
cpu::MultiplyManyRows multiply_many_rows;
int64_t few_rows_scratch_floats(const cpu::Linear&);
int64_t many_rows_scratch_floats(const cpu::Linear&);
}  // namespace paged::amx
#endif

namespace paged {
namespace {

constexpr bool (*yes)() = [] { return true; };

#if defined(__x86_64__)
bool has_bfloat16_dots() { return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"); }

// Linux lets a process use tiles once it has asked; its threads too, from then on.
bool has_tiles() {
#if defined(PAGED_SOFTWARE_TILES)
  return has_bfloat16_dots();
#else
  constexpr unsigned kFeatures = 7, kBFloat16Tiles = 1 << 22, kTiles = 1 << 24;
  constexpr long kAskForFeature = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!has_bfloat16_dots() || !__get_cpuid_count(kFeatures, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kTiles) || !(edx & kBFloat16Tiles)) return false;
  return syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
#endif
}

// AVX-512, and tiles for what multiplies matrices of bfloat16.
constexpr CpuKernels with_amx(CpuKernels set) {
  set.name = "amx";
  set.machine_has_it = has_tiles;
  set.attention_bfloat16.decode = amx::attention_decode_bfloat16;
  set.attention_bfloat16.prefill = amx::attention_prefill_bfloat16;
  set.attention_bfloat16.prefill_rows = kTilePrefillRows;
  set.attention_bfloat16.scratch_floats = amx_scratch_floats;
  set.attention_bfloat16.bytes_per_multiply_add = kTileBytesPerMultiplyAdd;
  set.multiply_panels = amx::multiply_panels;
  set.linear = {amx::has_many_rows, amx::multiply_few_rows, amx::multiply_many_rows, amx::few_rows_scratch_floats,
                amx::many_rows_scratch_floats};
  return set;
}
#endif

// From the fewest instructions to the most.
constexpr CpuKernels kInstructionSets[] = {
#if defined(__aarch64__)
    PAGED_KERNELS(neon, yes, yes),
#else
    PAGED_KERNELS(baseline, yes, yes),
#endif
#if defined(__x86_64__)
    PAGED_KERNELS(
        avx2, [] { return bool(__builtin_cpu_supports("x86-64-v3")); }, yes),
    PAGED_KERNELS(
        avx512, [] { return bool(__builtin_cpu_supports("x86-64-v4")); }, yes),
    // A 4th generation Xeon has a dot product of bfloat16 every 2.1 cycles, 15 multiplications a cycle, and two
    // products of floats in each cycle, 32 multiplications.
    PAGED_KERNELS(avx512bf16, has_bfloat16_dots, [] { return !__builtin_cpu_is("intel"); }),
    with_amx(PAGED_KERNELS(avx512, yes, yes)),
#endif
};

const CpuKernels& choose() {
  const char* wanted = std::getenv("TORCH_PAGED_CPU_ISA");
  const CpuKernels* best = nullptr;
  const bool free_choice = !wanted || !*wanted;
  for (const CpuKernels& set : kInstructionSets)
    if ((free_choice ? set.machine_likes_it() : std::string(wanted) == set.name) && set.machine_has_it()) best = &set;
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
