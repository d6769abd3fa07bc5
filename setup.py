"""Compiles torch_paged/_C.so and, where nvcc is found, torch_paged/_cuda.so with ninja, in build/native.

With TORCH_PAGED_SANITIZE=address,undefined it compiles _C.so alone, with these sanitizers, in build/sanitized.
With TORCH_PAGED_EMULATED=1 it compiles _cuda.so alone, for tests/emulator to run on the CPU, in build/emulated.
"""

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from _build import OLDEST_TORCH, TESTED_TORCH, find_torch

ROOT = Path(__file__).parent.resolve()
SANITIZERS = os.environ.get("TORCH_PAGED_SANITIZE", "")
EMULATED = os.environ.get("TORCH_PAGED_EMULATED") == "1"

# The stable ABI of torch 2.11: one library loads on every later torch and on any Python.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
CUDA_ARCHITECTURES = "80;90a;100;120"
# By the compiler's machine, from the slowest to the fastest, with the flags that each takes.
AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    # x86-64 without AVX2 is older than 2013: there the compile time of every change counts for more than speed.
    "x86_64": {
        "baseline": "-O2",
        "avx2": "-march=x86-64-v3",
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16",
        "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    },
    "aarch64": {"neon": ""},
}


@dataclass
class NinjaFile:
    """The text of a build.ninja, and the libraries it makes."""

    text: str
    libraries: list[str] = field(default_factory=list)

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.text += f"rule {name}\n  command = {command}\n  description = {name} $out\n"
        if depfile:
            self.text += "  depfile = $out.d\n  deps = gcc\n"

    def library(self, name: str, objects: list[tuple[str, Path, str]], compile_rule: str, link_rule: str) -> None:
        for target, source, flags in objects:
            self.text += f"build {target}: {compile_rule} {_escape(source)}\n  flags = {flags}\n"
        self.text += f"build {name}: {link_rule} {' '.join(target for target, _, _ in objects)}\n"
        self.libraries.append(name)


class BuildNative(build_ext):
    """Writes build.ninja, runs it, and puts the libraries and a note of what they hold into the package."""

    def run(self) -> None:
        if SANITIZERS and self.inplace:
            raise SystemExit(
                f"torch_paged: TORCH_PAGED_SANITIZE={SANITIZERS}: kernels that load nowhere without the sanitizers' "
                "libraries; unset it to install, or run the tests with them: `python -m tests.build.sanitized`"
            )
        if EMULATED and self.inplace:
            raise SystemExit(
                "torch_paged: TORCH_PAGED_EMULATED=1: kernels that only the tests can run; unset it to install, "
                "or run `pytest tests/ops -k cuda-emulated`"
            )
        torch = _require_torch()
        compiler, instruction_sets = _require_compiler()
        self.folder = _build_folder(compiler)
        ninja = _require_ninja()
        nvcc = None if SANITIZERS else _find_nvcc()
        architectures = _cuda_architectures(nvcc) if nvcc else []

        file = NinjaFile("ninja_required_version = 1.5\n")
        if not EMULATED:
            _cpu_part(file, torch, compiler, instruction_sets)
        if architectures:
            _cuda_part(file, torch, nvcc, architectures)
        info = {
            "cpu_instruction_sets": list(instruction_sets),
            "cuda_architectures": architectures,
            "compiler": _first_line([*compiler, "--version"]),
            "nvcc": _first_line([nvcc, "--version"], last=True) if architectures else None,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two builds at once in one folder would spoil ninja's log of what is up to date.
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _write_if_changed(self.folder / "build.ninja", file.text)
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            if subprocess.call([*ninja, "-C", str(self.folder), *jobs]):
                without_cuda = "; to build without CUDA, set TORCH_PAGED_CUDA_ARCHS=none" if architectures else ""
                raise SystemExit(f"torch_paged: the compiler stopped at the error above{without_cuda}")
            self._install(file.libraries, info)

    def _install(self, libraries: list[str], info: dict) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "torch_paged"
        package.mkdir(parents=True, exist_ok=True)
        for stale in {"_C.so", "_cuda.so"} - set(libraries):
            (package / stale).unlink(missing_ok=True)
        for name in libraries:
            if not _same_file(self.folder / name, package / name):
                # A new inode: a process that has the old library mapped keeps running on it.
                shutil.copy2(self.folder / name, package / (name + ".new"))
                os.replace(package / (name + ".new"), package / name)
        _write_if_changed(package / "_build_info.json", json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return []


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the libraries do not use Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _cpu_part(file: NinjaFile, torch: Path, compiler: list[str], instruction_sets: dict[str, str]) -> None:
    cpu = ROOT / "csrc" / "cpu"
    sources = sorted(cpu.glob("*.cpp"))
    if not sources:
        raise SystemExit(f"torch_paged: no C++ sources in {cpu}; the checkout is incomplete, clone it again")
    objects = [(f"cpu/{source.stem}.o", source, "") for source in sources]
    for name, flags in instruction_sets.items():
        # AMX has kernels of its own for some ops, and AVX-512's for the rest.
        for source in sorted((cpu / ("amx" if name == "amx" else "isa")).glob("*.cpp")):
            objects.append((f"cpu/{source.stem}.{name}.o", source, f"{flags} -DPAGED_ISA={name}"))

    # No -ffast-math: it would break NaN and -inf, which masking and empty rows rely on.
    flags = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall"
    if "clang" not in _first_line([*compiler, "--version"]):
        # GCC 12 takes the deliberately undefined operands in its own AVX-512 headers for mistakes.
        flags += " -Wno-maybe-uninitialized"
        # A copy of every loop for each flag of a call: a sixth of the compile time, and no speed.
        flags += " -fno-split-loops -fno-unswitch-loops"
    sanitize = ""
    if SANITIZERS:
        # Behind all other flags: from -O2 on the checks take three times as long to compile. The first finding aborts.
        # Tiles in software: what AMX itself reads and writes is not checked.
        sanitize = f" -O1 -g1 -fno-omit-frame-pointer -fsanitize={SANITIZERS} -fno-sanitize-recover=all"
        sanitize += " -DPAGED_SOFTWARE_TILES"
    command = f"{shlex.join(compiler)} {flags} {_torch_flags(torch)} $flags{sanitize} -MMD -MF $out.d -c $in -o $out"
    file.rule("cxx", command, depfile=True)
    file.rule("link", f"{shlex.join(compiler)} -shared{sanitize} $in {_link_torch(torch, '-Wl,')} -o $out")
    file.library("_C.so", objects, "cxx", "link")


def _cuda_part(file: NinjaFile, torch: Path, nvcc: str, architectures: list[str]) -> None:
    cuda = ROOT / "csrc" / "cuda"
    sources = sorted([*cuda.glob("*.cu"), *cuda.glob("*.cpp")])
    if not sources:
        raise SystemExit(f"torch_paged: no CUDA sources in {cuda}; the checkout is incomplete, clone it again")
    link = f"-cudart static $in {_link_torch(torch, '-Xlinker ')}"
    if EMULATED:
        # PTX alone, as text with the source's lines: tests/emulator reads it out of the library.
        targets = ["-gencode arch=compute_80,code=compute_80 -lineinfo --no-compress"]
        stand_ins = sorted((ROOT / "tests" / "emulator").glob("*.cpp"))
        sources += stand_ins
        wrapped = sorted({name for s in stand_ins for name in re.findall(r"__wrap_(\w+)\(", s.read_text())})
        wraps = " ".join(f"-Xlinker --wrap={name}" for name in wrapped)
        link = f"-cudart none $in {wraps} -Xlinker -Bsymbolic {_link_torch(torch, '-Xlinker ')}"
    else:
        # One PTX for all, as tests/emulator runs it: no kernel needs what later architectures add; later GPUs take it.
        virtual = min(architectures, key=_architecture_number)
        virtual = f"compute_{_architecture_number(virtual)}"
        codes = ",".join(f"sm_{a}" for a in architectures)
        targets = [f"-gencode arch={virtual},code=[{codes},{virtual}]"]
    command = (
        f"{shlex.quote(nvcc)} -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {' '.join(targets)} "
        f"{_torch_flags(torch)} -DUSE_CUDA $flags -MD -MF $out.d -c $in -o $out"
    )
    file.rule("nvcc", command, depfile=True)
    file.rule("nvlink", f"{shlex.quote(nvcc)} -shared {link} -o $out")
    file.library("_cuda.so", _cuda_objects(cuda, sources), "nvcc", "nvlink")


def _cuda_objects(cuda: Path, sources: list[Path]) -> list[tuple[str, Path, str]]:
    """Return the objects to compile; the attention kernels' source once per head dimension and element type."""
    instance = cuda / "attention_instance.cu"
    dims = re.search(r"kTileDims\[\] = \{([\d, ]+)\}", (cuda / "tile_shape.h").read_text())
    # The longest compilations first: the last one to start then ends early.
    objects = [
        (f"cuda/attention.{element}.{dim}.o", instance, f"-DPAGED_ELEMENT={element} -DPAGED_DIM={dim}")
        for dim in sorted(map(int, dims[1].split(",")), reverse=True)
        for element in ("__nv_bfloat16", "__half")
    ]
    return objects + [(f"cuda/{source.name}.o", source, "") for source in sources if source != instance]


def _torch_flags(torch: Path) -> str:
    return f"-isystem {shlex.quote(str(torch / 'include'))} {TORCH_TARGET}"


def _link_torch(torch: Path, linker_prefix: str) -> str:
    # --no-as-needed: libtorch.so defines none of the symbols itself, it only pulls in the libraries that do.
    return f"-L{shlex.quote(str(torch / 'lib'))} {linker_prefix}--no-as-needed -ltorch"


def _require_torch() -> Path:
    torch = find_torch()
    if torch is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"torch_paged: no torch {oldest} or newer to build against in {sys.prefix}; "
            f"run `pip install {TESTED_TORCH}` first, or install without --no-build-isolation"
        )
    return torch


def _require_compiler() -> tuple[list[str], dict[str, str]]:
    """Return the C++ compiler's command, and the instruction sets of its machine, whose flags it knows."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"torch_paged: C++ compiler not found: {command[0]}; "
            "install GCC 11+ or Clang 12+ (Debian, Ubuntu: `apt-get install g++`), or name one in CXX"
        )
    instruction_sets = INSTRUCTION_SETS.get(_machine(command), {"baseline": ""})
    for flags in instruction_sets.values():
        probe = [*command, *flags.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode:
            raise SystemExit(
                f"torch_paged: {shlex.join(command)} does not compile C++17 with `{flags}`; "
                "install GCC 11+ or Clang 12+, or name one in CXX"
            )
    return command, instruction_sets


def _machine(compiler: list[str]) -> str:
    """Return the name of the machine that the compiler compiles for."""
    return _first_line([*compiler, "-dumpmachine"]).partition("-")[0]


def _build_folder(compiler: list[str]) -> Path:
    if SANITIZERS or EMULATED:
        return ROOT / "build" / ("sanitized" if SANITIZERS else "emulated")
    return ROOT / "build" / ("native" if _machine(compiler) == platform.machine() else _machine(compiler))


def _require_ninja() -> list[str]:
    if find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if path := shutil.which("ninja"):
        return [path]
    raise SystemExit(
        "torch_paged: ninja not found; run `pip install ninja` first, or install without --no-build-isolation"
    )


def _find_nvcc() -> str | None:
    if os.environ.get("TORCH_PAGED_CUDA_ARCHS") == "none":
        print("torch_paged: TORCH_PAGED_CUDA_ARCHS=none: building for the CPU alone")
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None and (home := os.environ.get("CUDA_HOME")):
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        print(
            "torch_paged: nvcc not found: building for the CPU alone; for the CUDA kernels put nvcc on PATH "
            "or set CUDA_HOME, and install again"
        )
    return nvcc


def _cuda_architectures(nvcc: str) -> list[str]:
    """Return the architectures asked for, or those of the default list that this nvcc knows."""
    if asked := os.environ.get("TORCH_PAGED_CUDA_ARCHS"):
        return [a.strip() for a in asked.replace(",", ";").split(";") if a.strip()]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [a for a in CUDA_ARCHITECTURES.split(";") if f"sm_{a.rstrip('a')}" in known]


def _architecture_number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _first_line(command: list[str], last: bool = False) -> str:
    lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return lines[-1 if last else 0] if lines else ""


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _same_file(left: Path, right: Path) -> bool:
    if not right.exists():
        return False
    a, b = left.stat(), right.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


setup(
    ext_modules=[Extension("torch_paged._C", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
