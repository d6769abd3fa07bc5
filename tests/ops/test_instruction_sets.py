"""Each compiled instruction set that this machine runs passes the tests of every kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_paged import ops

KERNELS = [
    "attention",
    "attention_prefill",
    "copy_blocks",
    "gated_linear",
    "gather_cache",
    "linear",
    "merge_attention_states",
    "packed_linear",
    "qkv_linear",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
]
TESTS = [str(Path(__file__).with_name(f"test_{name}.py")) for name in KERNELS]
# The process's own choice runs in those files themselves.
OTHERS = [name for name in ops.cpu_instruction_sets() if name != ops.cpu_instruction_set()]


def run_python(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_PAGED_CPU_ISA": instruction_set}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", OTHERS)
def test_kernels_on(name):
    chosen = run_python(name, "-c", "from torch_paged import ops; print(ops.cpu_instruction_set())")
    assert chosen.stdout.strip() == name, chosen.stderr
    # Attention in float64 has one kernel for all sets.
    which = "(matches or deterministic or large) and not (test_attention and float64) and not cuda"
    run = run_python(name, "-m", "pytest", "-v", "-x", *TESTS, "-k", which)
    assert run.returncode == 0, run.stdout + run.stderr
    for test in TESTS:
        assert f"{Path(test).name}::" in run.stdout, f"no test of {test} ran"


def test_one_set_at_least():
    assert ops.cpu_instruction_sets()[0] in ("baseline", "neon")
    assert ops.cpu_instruction_set() in ops.cpu_instruction_sets()


def test_the_fastest_set_is_chosen():
    """The last one, but for Intel's dot products of bfloat16 without AMX, which are slower than its float32."""
    sets = ops.cpu_instruction_sets()
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        sets = [name for name in sets if name != "avx512bf16"]
    chosen = run_python("", "-c", "from torch_paged import ops; print(ops.cpu_instruction_set())")
    assert chosen.stdout.strip() == sets[-1], chosen.stderr


def test_unknown_set_is_refused():
    code = "from torch_paged import ops\ntry: ops.cpu_instruction_set()\nexcept ValueError as error: print(error)"
    run = run_python("sse9", "-c", code)
    sets = ",".join(ops.cpu_instruction_sets())
    assert run.stdout.strip() == f"TORCH_PAGED_CPU_ISA: sse9; must be one of {sets} on this machine, or unset"
