"""Tensors made from weights: kept for all graphs, and made again when a weight has changed."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from torch_paged.ops.gather_in_huge_pages import gather_in_huge_pages

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


class DerivedInputs:
    """What a compiled graph gets on top of the captured one's inputs, looked up anew only when a weight has changed.

    One loop over the sources shows that none has: 0.12 ms for the 290 of 24 layers, where as many lookups take 0.41
    (AMD EPYC, Zen 4).
    """

    def __init__(self, derived: Sequence[Derived], *, huge_pages: bool) -> None:
        self._derived = derived
        self._huge_pages = huge_pages
        self._places = sorted({place for each in derived for place in each.sources})
        self._last = _Seen(-1, [], [])

    def tensors(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """Return a tensor for each of the derived inputs, made from the present weights."""
        last = self._last
        if last.forgotten == _forgotten.times and last.still(inputs):
            tensors = [tensor for reference in last.tensors if (tensor := reference()) is not None]
            if len(tensors) == len(self._derived):
                return tensors
        forgotten = -1
        while forgotten != _forgotten.times:
            # Tensors that are made again count, here and in other threads.
            forgotten = _forgotten.times
            tensors = [each.tensor(inputs) for each in self._derived]
        if self._huge_pages:
            gather_in_huge_pages(tensors)
        sources = [(place, weakref.ref(inputs[place]), _facts([inputs[place]])) for place in self._places]
        self._last = _Seen(forgotten, sources, [weakref.ref(tensor) for tensor in tensors])
        return tensors


@dataclass(frozen=True)
class _Seen:
    """The sources of derived tensors and the tensors themselves in one call; nothing is kept alive.

    Attributes:
        forgotten: how often kept tensors had been forgotten then.
        sources: place among the inputs, the tensor, its version and address.
    """

    forgotten: int
    sources: list[tuple[int, weakref.ref[Any], tuple[int, ...]]]
    tensors: list[weakref.ref[Tensor]]

    def still(self, inputs: Sequence[Any]) -> bool:
        for place, reference, facts in self.sources:
            if reference() is not inputs[place] or facts != _facts((inputs[place],)):
                return False
        return True


def repack() -> None:
    """Make every merged and packed weight again at its next use.

    Needed after weights were written behind PyTorch's back: through `.data`, as PEFT merges adapters, or by a kernel
    of one's own. `load_state_dict`, steps of optimizers, `.to()` and assignments are noticed without, and what
    `repack_if_written` finds in the first compiled pass over a cache.
    """
    _forget(lambda entry: True)


def repack_if_written(weights: Iterable[Tensor]) -> None:
    """Make what was made of these weights again, where a sample of some weight's elements has changed unseen.

    That finds what writes whole weights through `.data`: merged adapters, moving averages. Eight rows and columns of
    each weight, or a few more, are compared: 1.3 ms for 170 weights, so not in each step.
    """
    with _lock:
        for weight in weights:
            for entry in _made.get(weight, {}).values():  # type: ignore[no-untyped-call]
                if entry.was_written():
                    entry.facts = ()
                    _forgotten.times += 1


def _forget(changed: Callable[[_Entry], bool]) -> None:
    with _lock:
        for made in _made.values():  # type: ignore[no-untyped-call]
            for entry in made.values():
                if changed(entry):
                    entry.facts = ()
                    _forgotten.times += 1


@functools.cache
def _watch_optimizers() -> None:
    """Fused optimizers count no version of what they write."""

    def after_step(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        _forget(lambda entry: any(id(reference()) in stepped for reference in entry.references))

    register_optimizer_step_post_hook(after_step)


class _Entry:
    """One derived tensor, with what its sources were when it was made."""

    def __init__(self, sources: Sequence[Tensor], tensor: Tensor) -> None:
        self.references = [weakref.ref(source) for source in sources]
        self.tensor = tensor
        self.see(sources)

    def see(self, sources: Sequence[Tensor]) -> None:
        """Remember what the sources are, now that `tensor` is made of them."""
        self.facts = _facts(sources)
        self.samples = [_sample(source).clone() for source in sources]

    def was_written(self) -> bool:
        """Whether sampled elements of a source differ from those that it was made of, in any bit."""
        pairs = zip(self.references, self.samples, strict=True)
        return any((source := of()) is not None and not torch.equal(_sample(source), seen) for of, seen in pairs)

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        return all(reference() is source for reference, source in zip(self.references, sources, strict=True))


@dataclass
class _Forgotten:
    times: int = 0


_forgotten = _Forgotten()
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
        if entry is not None:
            # Other graphs have seen the tensor of before, which changes or goes.
            _forgotten.times += 1
        if entry is not None and entry.is_of(sources) and _alike(entry.tensor, tensor):
            # In place: CUDA graphs know the address.
            entry.tensor.copy_(tensor)
            entry.see(sources)
            return entry.tensor  # type: ignore[no-any-return]
        _made.setdefault(sources[0], {})[key] = _Entry(sources, tensor)  # type: ignore[no-untyped-call]
        return tensor


def _facts(sources: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([fact for source in sources for fact in (source._version, source.data_ptr())])


def _sample(source: Tensor) -> Tensor:
    """Some elements as the integers of their bits, so that NaN equals itself; a view."""
    some = source.detach()[tuple(slice(None, None, max(1, size // 8)) for size in source.shape)]
    return some.view(_INTEGERS[source.element_size()])


# By the bytes of an element.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
