// The kernels of the instruction set in use, chosen when the first op runs.
#pragma once

#include <string>

#include "attention_work.h"
#include "copy_blocks.h"
#include "gather_cache.h"
#include "linear.h"
#include "merge_attention_states.h"
#include "packed_linear.h"
#include "reshape_and_cache.h"
#include "rms_norm.h"
#include "rope_and_cache.h"

namespace paged {

struct CpuKernels {
  const char* name;
  bool (*machine_has_it)();
  bool (*machine_likes_it)();  // whether it is faster there than the sets before it
  AttentionKernels attention_float32, attention_bfloat16, attention_float16;
  cpu::StoreTokens* store_tokens;
  cpu::RotateTokens* rotate_tokens;
  cpu::LoadBlocks* load_blocks;
  cpu::CopyBlock* copy_block;
  cpu::MergeStates* merge_states;
  cpu::MultiplyPanels* multiply_panels;
  cpu::LinearKernels linear;
  cpu::NormaliseRows* normalise_rows;
};

// The best set that this machine runs, or the one named by the environment variable TORCH_PAGED_CPU_ISA.
// Throws std::runtime_error if that name is unknown or the machine lacks the set.
const CpuKernels& cpu_kernels();

// Compiled sets that this machine runs, from the fewest instructions to the most, joined by commas.
std::string supported_instruction_sets();

}  // namespace paged
