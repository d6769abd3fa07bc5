"""Forward hooks that may tell rows apart by their place in the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ROW_HOOKS = "forward hooks of its modules may tell rows apart by their place in the batch"
# The hooks of these look at no row: they move weights, ask for gradients or hand out outputs.
_HOOKS_OF = ("torch.", "transformers.", "accelerate.", "deepspeed.", "peft.peft_model", "peft.utils.")


def has_row_hooks(model: nn.Module) -> bool:
    """Whether code of others sees inputs or outputs of modules as they run, in which rows have their places.

    So PEFT chooses an adapter for each row (`adapter_names`), and users steer or record activations.
    """
    return any(not _module_of(hook).startswith(_HOOKS_OF) for hook in _hooks(model))


@contextmanager
def hooks_of(model: nn.Module, rows: Sequence[int], num_rows: int) -> Iterator[None]:
    """Let arguments of partial hooks that have one value for each of `num_rows` rows, as PEFT's, have those of `rows`.

    What a hook knows of rows besides, nobody sees.
    """
    if len(rows) == num_rows:
        yield
        return
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for hook in _hooks(model):
        if isinstance(hook, functools.partial) and (given := _per_row(hook.keywords, num_rows)):
            changed.append((hook.keywords, given))
    chosen = list(rows)
    for keywords, given in changed:
        for name, value in given.items():
            keywords[name] = value[chosen] if isinstance(value, Tensor) else type(value)(value[row] for row in chosen)
    try:
        yield
    finally:
        for keywords, given in changed:
            keywords.update(given)


def _hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()


def _per_row(keywords: dict[str, Any], num_rows: int) -> dict[str, Any]:
    return {name: v for name, v in keywords.items() if isinstance(v, (list, tuple, Tensor)) and len(v) == num_rows}


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{hook.__module__}."
