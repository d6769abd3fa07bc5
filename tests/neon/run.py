"""Runs the tests of every kernel on its NEON build, cross-compiled for aarch64 and emulated by qemu.

`python -m tests.neon.run [options of pytest]`. Where the tools are missing it says so, and passes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from _build import OLDEST_TORCH, find_torch
from tests.neon.emulated import Emulated

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "aarch64"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
PACKAGES = "g++-aarch64-linux-gnu qemu-user-static"

KERNELS = [
    "attention",
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
TESTS = [f"tests/ops/test_{name}.py" for name in [*KERNELS, "attention_rejects", "swap_blocks"]]
# A cache of 2^31 elements takes too long from process to process.
DEFAULT = ["-q", *TESTS, "-k", "not cuda and not beyond_2_to_31"]


def build() -> None:
    """Build `_C.so` as an installation on such a machine would, and the process that serves its ops."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    cross = [COMPILER, "-std=c++17", "-O2", "-Wall", "-isystem", find_torch() / "include", target]
    subprocess.run([*cross, "-fPIC", "-shared", HERE / "torch_stub.cpp", "-o", BUILD / "libtorch.so"], check=True)
    # The linker passes over the libtorch of the other machine and takes this one.
    environment = os.environ | {"CXX": f"{COMPILER} -L{BUILD}", "TORCH_PAGED_CUDA_ARCHS": "none"}
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", BUILD / "package"]
    subprocess.run(setup, cwd=ROOT, env=environment, check=True)
    libraries = [f"-L{BUILD}", "-ltorch", "-Wl,--no-as-needed", BUILD / "package/torch_paged/_C.so"]
    subprocess.run([*cross, HERE / "serve.cpp", *libraries, "-o", BUILD / "serve"], check=True)


def serve() -> list[str]:
    """Return the command of the process that serves the ops."""
    libc = subprocess.run([COMPILER, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True).stdout
    system = Path(libc.strip()).resolve().parents[1]
    return [EMULATOR, "-L", str(system), "-E", f"LD_LIBRARY_PATH={BUILD}", str(BUILD / "serve")]


class OnNeon:
    """The pytest plugin: every op is served by the emulated process, from before the tests are collected."""

    def __init__(self) -> None:
        from torch_paged import ops

        self.emulated = Emulated(serve())
        self.library = self.emulated.replace_kernels()
        if ops.cpu_instruction_sets() != ["neon"]:
            raise RuntimeError(f"the ops run on {ops.cpu_instruction_sets()}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{self.emulated.num_calls} calls of ops on NEON")


def main(arguments: list[str]) -> int:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        print(f"tests.neon.run: skipped without {' and '.join(missing)}: `apt-get install {PACKAGES}`")
        return 0
    build()
    return pytest.main([*DEFAULT, *arguments], plugins=[OnNeon()])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
