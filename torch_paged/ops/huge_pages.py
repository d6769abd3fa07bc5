"""Large pages behind caches and weights, as reads miss the TLB less in them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_paged.ops._library import define, fake

define("_prefer_huge_pages(Tensor storage, int begin, int end) -> ()")
define("_gather_in_huge_pages(Tensor[] tensors) -> int")

_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What keeps its small pages at the start of a cache: a cache of which little is used commits little.
SMALL_PAGES = 2 << 20


def prefer_huge_pages(storage: Tensor, begin: int, end: int) -> None:
    """Let bytes of `storage` past the first 2 MiB lie in pages of 2 MiB, where they are not committed yet.

    Decoding over random blocks of 16 then reads 4 to 39 % more a second (the shapes of `bench ops`, 2 cores of a 4th
    generation Xeon). Does nothing on other devices than the CPU, and where the system has no such pages.

    Args:
        storage: uint8 `[nbytes]`.
        begin, end: the bytes of one cache within it.

    Raises:
        RuntimeError: `[begin, end)` is not within `storage`.
    """
    if storage.device.type == "cpu":
        torch.ops.paged._prefer_huge_pages(storage, min(begin + SMALL_PAGES, end), end)


def gather_in_huge_pages(tensors: Sequence[Tensor]) -> int:
    """Move what tensors on the CPU hold into pages of 2 MiB, where it is; values and addresses stay.

    Takes a second or two for a gigabyte, once. Does nothing where the system has no such pages or is set to never use
    them, before Linux 6.1, and to memory that is a file's.

    Args:
        tensors: strided, on the CPU.

    Returns:
        Bytes that lie in such pages now.
    """
    if not tensors or not _STATE.exists() or "[never]" in _STATE.read_text():
        return 0
    nbytes: int = torch.ops.paged._gather_in_huge_pages(tensors)
    return nbytes


@fake("_prefer_huge_pages")
def _(storage: Tensor, begin: int, end: int) -> None: ...


@fake("_gather_in_huge_pages")
def _(tensors: list[Tensor]) -> int:
    return 0
