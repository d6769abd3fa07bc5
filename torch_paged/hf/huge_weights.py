"""The weights of a patched model in pages of 2 MiB."""

import logging

from torch import nn

from torch_paged.ops.gather_in_huge_pages import gather_in_huge_pages

_log = logging.getLogger("torch_paged")


def gather_weights(model: nn.Module) -> None:
    """Move the model's weights on the CPU into large pages, in place."""
    nbytes = gather_in_huge_pages(model.parameters())
    if nbytes:
        _log.info("%s: %.0f MiB of weights lie in pages of 2 MiB", type(model).__name__, nbytes / 2**20)
