"""The examples run as a user would run them, and check themselves."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_generate():
    out = run("generate.py")
    assert "same tokens as stock: True" in out
    assert out.count("- It is a truth universally acknowledged, that") == 4


def test_custom_model_agrees_with_dense_attention():
    assert run("custom_model.py").startswith("118 tokens of 3 sequences in 9 blocks of 16\n")
