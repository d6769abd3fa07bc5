"""gather_in_huge_pages: what was written in small pages moved into large ones, as reads miss the TLB less there."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from torch_paged.ops._library import define, fake

define("_gather_in_huge_pages(Tensor[] storages) -> int")

_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather_in_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Move the memory of tensors into pages of 2 MiB, in place: values and addresses stay.

    Takes one to three seconds for a gigabyte, once. Leaves alone what is no plain memory of the CPU, what lies in a
    mapped file or in memory that is shared, as that of a process before a fork; does nothing before Linux 6.1 and where
    the system is set to never use such pages.

    Args:
        tensors: of any kind; what lies between two that are neighbours moves with them.

    Returns:
        Bytes that lie in such pages now.
    """
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and type(tensor) in _PLAIN:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
    if not storages or not _STATE.exists() or "[never]" in _STATE.read_text():
        return 0
    bytes_of = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
    nbytes: int = torch.ops.paged._gather_in_huge_pages(bytes_of)
    return nbytes


_PLAIN = (Tensor, torch.nn.Parameter)


@fake("_gather_in_huge_pages")
def _(storages: list[Tensor]) -> int:
    return 0
