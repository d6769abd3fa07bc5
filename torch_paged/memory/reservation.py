"""Address space for a pool on the CPU: committed by the system only as it is written, and given back in runs."""

import torch
from torch import Tensor

from torch_paged.ops._library import define, fake

define("_reserve(int nbytes) -> Tensor")
define("_release_pages(Tensor(a!) storage, Tensor ranges) -> ()")


def reserve(nbytes: int) -> Tensor:
    """Reserve `nbytes` of zeros: uint8 `[nbytes]` on the CPU, page-aligned, unmapped when its last view dies.

    Raises:
        MemoryError: the system refuses.
    """
    try:
        storage: Tensor = torch.ops.paged._reserve(nbytes)
    except RuntimeError as error:
        raise MemoryError(
            f"max_memory: the system refuses to reserve {nbytes} bytes of address space ({error}); choose less"
        ) from error
    return storage


def release_pages(storage: Tensor, ranges: Tensor) -> None:
    """Give the whole pages inside byte ranges of `storage` back to the system; they read as zeros from then on.

    Args:
        storage: from `reserve`.
        ranges: int64 `[n, 2]`, rows of (first byte, end byte).
    """
    torch.ops.paged._release_pages(storage, ranges)


@fake("_reserve")
def _(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@fake("_release_pages")
def _(storage: Tensor, ranges: Tensor) -> None: ...
