"""Tensors made from weights: kept for all graphs, and made again when a weight has changed."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

Make = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Derived:
    """An input that the compiled graph has on top of the captured one's, made from some of these.

    `sources` are places among the captured graph's inputs; `make` is a function of a module, which, with the sources,
    identifies the result.
    """

    sources: tuple[int, ...]
    make: Make

    def tensor(self, inputs: Sequence[Any]) -> Tensor:
        """Return what `make` makes of the present weights; the same tensor as long as the weights are the same."""
        return _kept([inputs[place] for place in self.sources], self.make)


def repack() -> None:
    """Make every merged and packed weight again at its next use.

    Needed after weights were written behind PyTorch's back: through `.data`, as PEFT merges adapters, or by a kernel
    of one's own. `load_state_dict`, steps of optimizers, `.to()` and assignments are noticed without.
    """
    _forget(lambda source: True)


def _forget(changed: Callable[[Tensor | None], bool]) -> None:
    with _lock:
        for made in _made.values():  # type: ignore[no-untyped-call]
            for entry in made.values():
                if any(changed(reference()) for reference in entry.references):
                    entry.facts = ()


@functools.cache
def _watch_optimizers() -> None:
    """Fused optimizers count no version of what they write."""

    def after_step(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        _forget(lambda source: id(source) in stepped)

    register_optimizer_step_post_hook(after_step)


class _Entry:
    """One derived tensor, with what its sources were when it was made."""

    def __init__(self, sources: Sequence[Tensor], tensor: Tensor) -> None:
        self.references = [weakref.ref(source) for source in sources]
        self.facts = _facts(sources)
        self.tensor = tensor

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        return all(reference() is source for reference, source in zip(self.references, sources, strict=True))


# By the first source, which keeps the entry alive; then by `make` and the identities of all sources.
_made = WeakIdKeyDictionary()
_lock = threading.Lock()


def _kept(sources: Sequence[Tensor], make: Make) -> Tensor:
    key = (make, *map(id, sources))
    entry = _made.get(sources[0], {}).get(key)  # type: ignore[no-untyped-call]
    if entry is not None and entry.is_of(sources) and entry.facts == _facts(sources):
        return entry.tensor  # type: ignore[no-any-return]
    _watch_optimizers()
    with _lock, torch.no_grad(), torch.inference_mode(False):
        tensor = make(sources)
        if entry is not None and entry.is_of(sources) and _alike(entry.tensor, tensor):
            # In place: CUDA graphs know the address.
            entry.tensor.copy_(tensor)
            entry.facts = _facts(sources)
            return entry.tensor  # type: ignore[no-any-return]
        _made.setdefault(sources[0], {})[key] = _Entry(sources, tensor)  # type: ignore[no-untyped-call]
        return tensor


def _facts(sources: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([fact for source in sources for fact in (source._version, source.data_ptr())])


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
