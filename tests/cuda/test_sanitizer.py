"""compute-sanitizer finds nothing in a subset of the tests of the ops, on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Each head dimension, and the call that has every option at once; of the other ops their layouts, or all.
SUBSET = "head_dim or everything or hnd or test_copy_blocks or test_merge"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="compute-sanitizer, of the CUDA toolkit, is not on PATH"
    ),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_ops_are_clean(tool):
    # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
    tests = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-x", "-m", "cuda", "-k", SUBSET]
    ran = subprocess.run([*sanitizer, *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout and "SUMMARY: 0 " in ran.stdout + ran.stderr
