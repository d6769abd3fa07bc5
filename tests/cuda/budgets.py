"""What each kernel may take of an SM, recorded in budgets.tsv: registers a thread, and blocks at once.

`python -m tests.cuda.budgets` records what the installed library takes, of all architectures of the default build.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch_paged
from tests.cuda.cubin import CompiledKernel, compiled_kernels

HERE = Path(__file__).parent
TABLE = HERE / "budgets.tsv"
LIBRARY = Path(torch_paged.__file__).parent / "_cuda.so"
# The devices that run the code of each architecture of a build.
DEVICES = {"80": ["80", "86"], "90": ["90"], "100": ["100"], "120": ["120"]}
_SHAPE = re.compile(r"attention_\w+_kernel<.*\b(Tile|Fma)Shape<(\d+), (\d+)> ?>")

# Registers a thread, and blocks of an SM.
Budget = tuple[int, int]


def budgets(kernels: list[CompiledKernel]) -> dict[tuple[str, str], Budget]:
    """Return what kernels take, by name and device."""
    found = [(k, device) for k in kernels for device in DEVICES.get(k.architecture, [k.architecture])]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "occupancy"
        subprocess.run(["nvcc", "-std=c++17", HERE / "occupancy.cpp", "-o", program], check=True)
        told = subprocess.run([program, "shapes"], capture_output=True, text=True, check=True).stdout
        shared = {tuple(shape): nbytes for *shape, nbytes in map(str.split, told.splitlines())}
        # Of other kernels, a few bytes at most, which are not dynamic.
        bytes_of = {k.name: shared[match.groups()] if (match := _SHAPE.fullmatch(k.name)) else 0 for k in kernels}
        lines = "".join(f"{device} {k.threads} {bytes_of[k.name]} {k.registers}\n" for k, device in found)
        ran = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    blocks = map(int, ran.stdout.split())
    return {(k.name, device): (k.registers, n) for (k, device), n in zip(found, blocks, strict=True)}


def recorded() -> dict[tuple[str, str], Budget]:
    rows = [line.split("\t") for line in TABLE.read_text().splitlines()[1:]]
    return {(name, device): (int(registers), int(blocks)) for name, device, registers, blocks in rows}


def record() -> None:
    found = budgets(compiled_kernels(LIBRARY))
    rows = [(name, device, *map(str, budget)) for (name, device), budget in sorted(found.items(), key=_order)]
    header = ("kernel", "device", "registers", "blocks")
    TABLE.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))


def _order(item: tuple[tuple[str, str], Budget]) -> tuple:
    (name, device), _ = item
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)], int(device)


if __name__ == "__main__":
    record()
