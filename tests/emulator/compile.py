"""Compiles CUDA sources of the tests to PTX."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.emulator.ptx import Module


def compile_ptx(source: Path, folder: Path, *options: str) -> Module:
    """Compile for compute capability 8.0, with the source's lines; the PTX is left in `folder`."""
    target = folder / f"{source.stem}.ptx"
    command = ["nvcc", "-std=c++17", "-arch=compute_80", "-lineinfo", *options, "-ptx", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return Module(target.read_text())
