"""Where `linear` is as fast as PyTorch."""

import functools
import sys

import torch

from torch_paged.ops.cpu_instruction_set import cpu_instruction_set


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Return with up to how many rows `linear` is as fast as PyTorch on this CPU, or faster.

    Few rows are bound by memory. Many are bound by arithmetic, in which PyTorch is as fast in float32 on Intel's, and
    where the CPU has AMX and `linear` does not use it. On other x86 CPUs it is slower. 4,864 x 896, 512 rows, GFLOP/s
    of PyTorch and `linear`: 2 cores of a 4th generation Xeon without AMX, 2026-11-30, bfloat16 162 and 276, float16
    295 and 290; held to AVX-512 without half precision 61 and 289, 25 and 247; held to AVX2 26 and 134, 28 and 130. 2
    cores of an AMD EPYC, Zen 4, 2026-11-30, bfloat16 393 and 403 (128 rows 367 and 408), float32 169 and 200 (896 x
    4,864: 193 and 205). 2 cores of a Xeon with AMX, 2026-11-30, bfloat16 1,620 to 2,030 and 1,670 to 1,970 (128 rows
    910 to 990 and 1,270 to 1,400), float16 280 and 250, float32 300 and 240.
    """
    halves = {torch.bfloat16, torch.float16}
    many = {"avx2": halves, "avx512": halves, "avx512bf16": halves | {torch.float32}}
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():
        many = {"amx": {torch.bfloat16}}
    return sys.maxsize if dtype in many.get(cpu_instruction_set(), set()) else 64
