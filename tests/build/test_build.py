"""The build: what it makes of its environment, what it rebuilds, and what it says when something is missing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def build(folder, python=sys.executable, **environment):
    command = [python, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "TORCH_PAGED_CUDA_ARCHS": "none", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build_info(folder):
    return json.loads((folder / "torch_paged/_build_info.json").read_text())


def fails_with_one_line(ran):
    lines = ran.stderr.strip().splitlines()
    return ran.returncode == 1 and len(lines) == 1 and lines[0].startswith("torch_paged: ")


def path_without(program):
    return os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not shutil.which(program, path=d))


def test_compiles_a_kernel_once_per_instruction_set(checkout):
    assert build(checkout).returncode == 0
    objects = sorted(path.name for path in (checkout / "build/native/cpu").glob("*kernel.*.o"))
    sets = [name for name in build_info(checkout)["cpu_instruction_sets"] if name != "amx"]
    assert objects == sorted([f"kernel.{name}.o" for name in sets] + ["tile_kernel.amx.o"])
    names = subprocess.run(["nm", "-C", checkout / "build/native/_C.so"], capture_output=True, text=True).stdout
    assert all(f"{name}::kernel()" in names for name in sets) and "amx::tile_kernel()" in names


def test_instruction_sets_are_those_of_the_compilers_machine(checkout):
    cross = checkout / "cross-g++"
    cross.write_text('#!/bin/sh\n[ "$1" = -dumpmachine ] && echo aarch64-linux-gnu || exec g++ "$@"\n')
    cross.chmod(0o755)
    assert build(checkout, CXX=str(cross)).returncode == 0
    assert build_info(checkout)["cpu_instruction_sets"] == ["neon"]
    assert [path.name for path in (checkout / "build/aarch64/cpu").glob("kernel.*.o")] == ["kernel.neon.o"]
    assert not (checkout / "build/native").exists()


def test_rebuilds_what_changed_and_only_that(checkout):
    build(checkout)
    library = checkout / "torch_paged/_C.so"
    first = library.read_bytes()
    assert "no work to do" in build(checkout).stdout
    (checkout / "csrc/cpu/answer.h").write_text("#define ANSWER 42\n")
    again = build(checkout)
    assert "cpu/ops.o" in again.stdout and "kernel" not in again.stdout
    assert library.read_bytes() != first


@needs_nvcc
def test_cuda_library_comes_and_goes_with_nvcc(checkout):
    assert build(checkout, TORCH_PAGED_CUDA_ARCHS="80, 90a").returncode == 0
    assert (checkout / "torch_paged/_cuda.so").exists()
    assert build_info(checkout)["cuda_architectures"] == ["80", "90a"]

    ran = build(checkout, TORCH_PAGED_CUDA_ARCHS="", PATH=path_without("nvcc"), CUDA_HOME="", CXX=shutil.which("g++"))
    assert ran.returncode == 0
    assert (
        "torch_paged: nvcc not found: building for the CPU alone; for the CUDA kernels put nvcc on PATH" in ran.stdout
    )
    assert not (checkout / "torch_paged/_cuda.so").exists()
    assert build_info(checkout)["cuda_architectures"] == []


@needs_nvcc
def test_default_architectures_end_with_ptx(checkout):
    assert build(checkout, TORCH_PAGED_CUDA_ARCHS="").returncode == 0
    built = build_info(checkout)["cuda_architectures"]
    # An older nvcc does not know the newest of them.
    assert built and built == ["80", "90a", "100", "120"][: len(built)]
    # The PTX of the oldest one, which later GPUs than any of them take too.
    codes = ",".join(f"sm_{architecture}" for architecture in built)
    assert f"code=[{codes},compute_80]" in (checkout / "build/native/build.ninja").read_text()


def test_missing_compiler(checkout):
    ran = build(checkout, CXX="no-such-compiler")
    assert fails_with_one_line(ran), ran.stderr
    assert "C++ compiler not found: no-such-compiler; install GCC 11+" in ran.stderr


def test_compiler_that_is_too_old(checkout):
    old = checkout / "old-g++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ran = build(checkout, CXX=str(old))
    assert fails_with_one_line(ran), ran.stderr
    assert f"{old} does not compile C++17" in ran.stderr


def test_error_in_a_source(checkout):
    (checkout / "csrc/cpu/ops.cpp").write_text("not C++\n")
    ran = build(checkout)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert ran.stderr.strip() == "torch_paged: the compiler stopped at the error above"
    assert "ops.cpp:1" in ran.stdout


def test_incomplete_checkout(checkout):
    (checkout / "csrc/cpu/ops.cpp").unlink()
    ran = build(checkout)
    assert fails_with_one_line(ran), ran.stderr
    assert "no C++ sources" in ran.stderr


def test_missing_torch(checkout, tmp_path):
    """In an environment that has setuptools alone, the way `--no-build-isolation` would meet it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (tmp_path / "site").mkdir()
    for package in ("setuptools", "_distutils_hack"):
        (tmp_path / "site" / package).symlink_to(Path(importlib.util.find_spec(package).origin).parent)
    ran = build(checkout, tmp_path / "venv/bin/python", PYTHONPATH=str(tmp_path / "site"))
    assert fails_with_one_line(ran), ran.stderr
    assert "no torch 2.11 or newer" in ran.stderr and "pip install torch==2.13.0" in ran.stderr


def test_backend_asks_for_torch_only_where_none_fits(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    import _build

    assert _build.torch_if_missing() == []
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: str(tmp_path))
    headers = tmp_path / "torch/include/torch/csrc/stable"
    headers.mkdir(parents=True)
    (headers / "library.h").touch()
    version = tmp_path / "torch/version.py"
    version.write_text("__version__ = '2.10.1+cpu'\n")
    assert _build.find_torch() is None
    assert _build.torch_if_missing() == ["torch==2.13.0"]
    version.write_text("__version__ = '2.11.0'\n")
    assert _build.find_torch() == tmp_path / "torch"


def test_emulated_kernels_are_not_installed(checkout):
    ran = build(checkout, TORCH_PAGED_EMULATED="1")
    assert fails_with_one_line(ran), ran.stderr
    assert "TORCH_PAGED_EMULATED=1: kernels that only the tests can run" in ran.stderr
