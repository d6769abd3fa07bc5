"""gather_in_huge_pages: what was written in small pages moved into large ones, as reads miss the TLB less there."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from torch_paged.ops._library import define, fake

define("_gather_in_huge_pages(Tensor[] storages) -> int")

_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather_in_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Move the memory of tensors into pages of 2 MiB, in place: values and addresses stay.

    Takes one to three seconds for a gigabyte, once. Leaves alone what is no plain memory of the CPU, what lies in a
    mapped file or in memory that is shared, as that of a process before a fork; does nothing before Linux 6.1, where
    pages are not of 4 KiB, and where the system is set to never use such pages.

    Args:
        tensors: of any kind; what lies between two that are neighbours moves with them.

    Returns:
        Bytes that lie in such pages now.
    """
    storages = plain_storages(tensors)
    if not storages or not _system_has_them():
        return 0
    # Whatever the default device is.
    bytes_of = [torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage) for storage in storages.values()]
    nbytes: int = torch.ops.paged._gather_in_huge_pages(bytes_of)
    return nbytes


def plain_storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of those that are plain memory of the CPU, by address."""
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and type(tensor) in (Tensor, Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
    return storages


def _system_has_them() -> bool:
    try:
        return "[never]" not in _STATE.read_text()
    except OSError:
        return False


@fake("_gather_in_huge_pages")
def _(storages: list[Tensor]) -> int:
    return 0
