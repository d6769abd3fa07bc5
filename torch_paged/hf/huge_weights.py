"""The weights of a patched model in pages of 2 MiB."""

import logging

from torch import Tensor, nn

from torch_paged.ops.huge_pages import gather_in_huge_pages

_log = logging.getLogger("torch_paged")


def gather_weights(model: nn.Module) -> None:
    """Move the model's weights on the CPU into large pages, where they are."""
    weights = [each.detach() for each in model.parameters() if type(each) is nn.Parameter and each.device.type == "cpu"]
    nbytes = gather_in_huge_pages([weight for weight in weights if type(weight) is Tensor])
    if nbytes:
        _log.info("%.0f MiB of weights lie in pages of 2 MiB", nbytes / 2**20)
