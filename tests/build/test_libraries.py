"""The compiled libraries: present, registered, and free of symbols that tie them to one torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_paged.memory.device_reservation  # which defines the ops of the device's memory

PACKAGE = Path(torch_paged.__file__).parent
BUILD = PACKAGE.parent / "build" / "native"
LIBRARIES = sorted(PACKAGE.glob("_*.so"))
INFO = json.loads((PACKAGE / "_build_info.json").read_text())

# C++ symbols of at::, c10:: and torch:: change between releases; the stable ABI is plain C.
UNSTABLE = re.compile(r"_ZNK?(2at|3c10|5torch)")

ON_CUDA = (
    "attention",
    "attention_with_lse",
    "merge_attention_states",
    "reshape_and_cache",
    "rope_and_cache",
    "gather_cache",
    "copy_blocks",
    "swap_blocks",
)


def undefined(library: Path) -> list[str]:
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in names.stdout.splitlines()]


def test_cuda_library_is_there_exactly_where_it_was_built():
    assert (PACKAGE / "_C.so") in LIBRARIES
    assert ((PACKAGE / "_cuda.so") in LIBRARIES) == bool(INFO["cuda_architectures"])


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_uses_the_stable_abi_alone(library):
    names = undefined(library)
    assert [name for name in names if UNSTABLE.match(name)] == []
    assert [name for name in names if name.startswith("Py")] == []
    assert any(name.startswith(("aoti_torch", "torch_")) for name in names), "nm found no torch symbol at all"


@pytest.mark.parametrize("op", ON_CUDA)
def test_kernels_are_registered(op):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"paged::{op}", "CPU")
    assert has_kernel(f"paged::{op}", "CUDA") == bool(INFO["cuda_architectures"])


@pytest.mark.parametrize("op", ("_device_page_bytes", "_reserve_on_device", "_map_pages", "_unmap_pages"))
def test_the_device_s_memory_is_registered(op):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{op}", "CUDA")
    assert has_kernel == bool(INFO["cuda_architectures"])


def test_objects_of_an_instruction_set_share_no_code():
    """A weak function compiled for AVX-512 could be the copy the linker keeps, and crash an older machine."""
    objects = [o for name in INFO["cpu_instruction_sets"] for o in (BUILD / "cpu").glob(f"*.{name}.o")]
    assert objects, f"no object per instruction set in {BUILD}"
    for path in objects:
        names = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in names.splitlines() if re.match(r"\S+ [WVu] ", line)]
        assert weak == [], path.name


def test_ops_work_without_transformers():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, torch_paged\n"
        "cache = torch_paged.ops.empty_cache(1, 1, 1, 8, dtype=torch.float32, device='cpu')\n"
        "new = torch.arange(8.0).view(1, 1, 8)\n"
        "torch_paged.ops.reshape_and_cache(new, -new, *cache, torch.tensor([0]))\n"
        "print(cache[0].sum().item(), cache[1].sum().item())\n"
        "try:\n"
        "    torch_paged.patch\n"
        "except ImportError as error:\n"
        "    print(error.name)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.split() == ["28.0", "-28.0", "transformers"], ran.stderr
