"""cpu_instruction_set: which of the compiled instruction sets the CPU kernels use."""

import torch

from torch_paged.ops._library import define, value_errors

define("cpu_instruction_set() -> str")
define("cpu_instruction_sets() -> str")


def cpu_instruction_set() -> str:
    """Return the set in use: the best that this machine runs, or the one that `TORCH_PAGED_CPU_ISA` names.

    The choice is made once per process.

    Raises:
        ValueError: `TORCH_PAGED_CPU_ISA` names a set that is unknown here.
    """
    with value_errors():
        name: str = torch.ops.paged.cpu_instruction_set()
    return name


def cpu_instruction_sets() -> list[str]:
    """Return the compiled sets that this machine runs, from the fewest instructions to the most."""
    names: str = torch.ops.paged.cpu_instruction_sets()
    return names.split(",")
