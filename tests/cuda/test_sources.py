"""What the sources of the CUDA kernels promise: inline assembly in one place, one instruction at a time."""

import re
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = {path.name: path.read_text() for path in CUDA.iterdir()}


def test_inline_assembly_is_in_ptx_cuh_alone():
    assert [name for name, text in SOURCES.items() if re.search(r"\basm\b", text)] == ["ptx.cuh"]


def test_a_wrapper_is_one_instruction():
    statements = re.findall(r'\basm(?: volatile)?\(\s*((?:"[^"]*"\s*)+)', SOURCES["ptx.cuh"])
    assert len(statements) == len(re.findall(r"\basm\b", SOURCES["ptx.cuh"]))
    assert all(statement.count(";") == 1 for statement in statements)


def test_files_are_small():
    assert max(text.count("\n") for text in SOURCES.values()) <= 300


def test_kernels_know_no_torch():
    """A kernel's file compiles in seconds, and on any torch."""
    faces = {"torch_face.h", "value_checks.h", "weak.h", "ops.cpp", "attention_op.cpp", "reservation_op.cpp"}
    assert {name for name, text in SOURCES.items() if re.search(r"#include <torch/|torch::", text)} == faces
