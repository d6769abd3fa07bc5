"""Compiled FlexAttention as one more form of attention on contiguous keys and values."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torch_paged.cli.bench.attention_ways import Form
from torch_paged.cli.bench.cases import Group
from torch_paged.cli.errors import CommandError


def fresh_form() -> Form:
    """FlexAttention, with all that was compiled for other shapes forgotten.

    After eight shapes of one function Dynamo would run it uncompiled from then on, and say so only in a log.
    """
    torch.compiler.reset()
    return flex_attention


def flex_attention(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    """A `Form` of attention_ways: causal attention of a group; compiled at the first call of each shape.

    Raises:
        CommandError: it does not compile here, mostly for want of a C++ compiler.
    """
    try:
        out: Tensor = _compiled()(query, key, value, block_mask=_causal(group), enable_gqa=True)
    except Exception as error:
        # Inductor fails in as many ways as there are compilers.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"--flex: FlexAttention does not compile here: {reason}") from None
    return out


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as flex

    compiled: Callable[..., Any] = torch.compile(flex.flex_attention, dynamic=False)
    return compiled


@cache
def _causal(group: Group) -> Any:
    if group.query_len == 1:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    earlier = group.context - group.query_len

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + earlier

    device = torch.get_default_device()
    return create_block_mask(visible, None, None, group.query_len, group.context, device=device)
