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
_TILE = re.compile(r"attention_tile_kernel<\w+, TileShape<(\d+), (\d+)> ?>")

# Registers a thread, and blocks of an SM where the shape of a block is fixed; else 0.
Budget = tuple[int, int]


def budgets(kernels: list[CompiledKernel]) -> dict[tuple[str, str], Budget]:
    """Return what kernels take, by name and device."""
    found = [(k, device) for k in kernels for device in DEVICES.get(k.architecture, [k.architecture])]
    tiles = [(k, device, tile) for k, device in found if (tile := _TILE.fullmatch(k.name))]
    lines = "".join(f"{device} {tile[1]} {tile[2]} {k.registers}\n" for k, device, tile in tiles)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "occupancy"
        subprocess.run(["nvcc", "-std=c++17", HERE / "occupancy.cpp", "-o", program], check=True)
        ran = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    blocks = {(k.name, device): int(n) for (k, device, _), n in zip(tiles, ran.stdout.split(), strict=True)}
    return {(k.name, device): (k.registers, blocks.get((k.name, device), 0)) for k, device in found}


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
