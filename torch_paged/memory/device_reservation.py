"""Address space for a pool on a CUDA device: memory is mapped to its pages one by one, and taken away again."""

import torch
from torch import Tensor

from torch_paged.ops._library import define, fake

define("_device_page_bytes(Tensor like) -> int")
define("_reserve_on_device(Tensor like, int nbytes) -> Tensor")
define("_map_pages(Tensor(a!) storage, Tensor runs) -> bool")
define("_unmap_pages(Tensor(a!) storage, Tensor runs) -> ()")


def device_page_bytes(like: Tensor) -> int:
    """Bytes of a page on the device of `like`; 0 where the driver has no virtual memory management."""
    nbytes: int = torch.ops.paged._device_page_bytes(like)
    return nbytes


def reserve_on_device(like: Tensor, nbytes: int) -> Tensor:
    """Reserve `nbytes` on the device of `like`: uint8 `[nbytes]`, of which the first page alone has memory.

    Reading or writing what has none is an error that no kernel of the process survives. All is given back when the
    last view dies.

    Raises:
        MemoryError: the device refuses.
    """
    try:
        storage: Tensor = torch.ops.paged._reserve_on_device(like, nbytes)
    except RuntimeError as error:
        raise MemoryError(
            f"max_memory: {like.device} refuses to reserve {nbytes} bytes of address space ({error}); choose less"
        ) from error
    return storage


def map_pages(storage: Tensor, runs: Tensor) -> bool:
    """Put memory behind pages that have none.

    Args:
        storage: from `reserve_on_device`.
        runs: int64 `[n, 2]` on the CPU, rows of (first page, end page), ascending.

    Returns:
        False where the device has no memory left; nothing has changed then.

    Raises:
        RuntimeError: the driver fails, or a page has memory.
    """
    mapped: bool = torch.ops.paged._map_pages(storage, runs)
    return mapped


def unmap_pages(storage: Tensor, runs: Tensor) -> None:
    """Give the memory of pages back to the device, once all work on the device that was launched so far is done.

    Args:
        storage: from `reserve_on_device`.
        runs: int64 `[n, 2]` on the CPU, rows of (first page, end page), ascending.

    Raises:
        RuntimeError: the driver fails, or a page has no memory.
    """
    torch.ops.paged._unmap_pages(storage, runs)


@fake("_device_page_bytes")
def _(like: Tensor) -> int:
    return 0


@fake("_reserve_on_device")
def _(like: Tensor, nbytes: int) -> Tensor:
    return like.new_empty(nbytes, dtype=torch.uint8)


@fake("_map_pages")
def _(storage: Tensor, runs: Tensor) -> bool:
    return True


@fake("_unmap_pages")
def _(storage: Tensor, runs: Tensor) -> None: ...
