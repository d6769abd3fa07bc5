"""Forward hooks that may tell rows apart by their place in the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

ROW_HOOKS = "forward hooks of its modules may tell rows apart by their place in the batch"
_ADAPTERS = "adapter_names"
# The hooks of these look at no row: they move weights, ask for gradients or hand out outputs.
_HOOKS_OF = ("torch.", "transformers.", "accelerate.", "deepspeed.", "peft.peft_model", "peft.utils.")


def has_row_hooks(model: nn.Module) -> bool:
    """Whether code of others sees inputs or outputs of modules as they run, in which rows have their places.

    So PEFT chooses an adapter for each row (`adapter_names`), and users steer or record activations.
    """
    return any(not _module_of(hook).startswith(_HOOKS_OF) for hook in _hooks(model))


@contextmanager
def hooks_of(model: nn.Module, rows: Sequence[int], num_rows: int) -> Iterator[None]:
    """Let PEFT's `adapter_names`, one for each of `num_rows` rows, be those of `rows`.

    What other hooks know of rows, nobody sees.
    """
    if len(rows) == num_rows:
        yield
        return
    partials = [hook.keywords for hook in _hooks(model) if isinstance(hook, functools.partial)]
    changed = [(keywords, names) for keywords in partials if len(names := keywords.get(_ADAPTERS, ())) == num_rows]
    for keywords, names in changed:
        keywords[_ADAPTERS] = [names[row] for row in rows]
    try:
        yield
    finally:
        for keywords, names in changed:
            keywords[_ADAPTERS] = names


def _hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{hook.__module__}."
