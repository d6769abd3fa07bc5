"""The weights of a patched model in pages of 2 MiB."""

import logging
import weakref

from torch import nn

from torch_paged.ops.gather_in_huge_pages import gather_in_huge_pages, plain_storages

_log = logging.getLogger("torch_paged")
# The addresses of what was moved, or could not be.
_seen: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def gather_weights(model: nn.Module) -> None:
    """Move the model's weights on the CPU into large pages, in place; once, unless they lie elsewhere by now."""
    weights = list(model.parameters())
    addresses = set(plain_storages(weights))
    if _seen.get(model) == addresses:
        return
    nbytes = gather_in_huge_pages(weights)
    _seen[model] = addresses
    if nbytes:
        _log.info("%s: %.0f MiB of weights lie in pages of 2 MiB", type(model).__name__, nbytes / 2**20)
