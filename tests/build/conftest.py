"""A checkout that compiles in a moment."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The build files around sources of one line each, so that a build takes a moment."""
    for name in ("setup.py", "_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc/cpu/isa", "csrc/cpu/amx", "csrc/cuda", "torch_paged"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cpu/answer.h").write_text("#define ANSWER 41\n")
    (tmp_path / "csrc/cpu/ops.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (tmp_path / "csrc/cpu/isa/kernel.cpp").write_text("namespace PAGED_ISA { int kernel() { return 0; } }\n")
    (tmp_path / "csrc/cpu/amx/tile_kernel.cpp").write_text("namespace PAGED_ISA { int tile_kernel() { return 0; } }\n")
    (tmp_path / "csrc/cuda/ops.cu").write_text("__global__ void kernel() {}\n")
    (tmp_path / "csrc/cuda/tile_shape.h").write_text("constexpr int kTileDims[] = {64};\n")
    (tmp_path / "csrc/cuda/attention_instance.cu").write_text("template <int> __global__ void attend() {}\n")
    shutil.copy(ROOT / "torch_paged/_version.py", tmp_path / "torch_paged")
    (tmp_path / "torch_paged/__init__.py").touch()
    return tmp_path
