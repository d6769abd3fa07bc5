"""patch, unpatch and paged: put a model on a paged pool, and take it off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from torch_paged.hf.config import PagedConfig
from torch_paged.hf.handle import PagedHandle, patching
from torch_paged.hf.huge_weights import gather_weights

_handles: weakref.WeakKeyDictionary[nn.Module, PagedHandle] = weakref.WeakKeyDictionary()
# How many borrow a model that nobody else has patched.
_borrowers: weakref.WeakKeyDictionary[PagedHandle, int] = weakref.WeakKeyDictionary()


def patch(model: nn.Module, **knobs: Any) -> PagedHandle:
    """Make `model.generate` keep its KV in blocks of a pool. This instance only; the same call, the same tokens.

    Patching twice is one patch. With other knobs than before the second call replaces the configuration, provided
    that no cache of the model holds blocks. A wrapper (PEFT, DistributedDataParallel, torch.compile) is looked
    through: what it wraps is patched.

    Args:
        model: a transformers model with `generate`, or a wrapper around one.
        **knobs: fields of `PagedConfig`.

    Returns:
        The handle: `stats()`, `reset_peak()`, `unpatch()`.

    Raises:
        TypeError: `model` is no transformers model, or a knob is unknown or of the wrong type.
        ValueError: `model` cannot generate, a knob is out of range, or `strict` and the model does not run natively.
        RuntimeError: other knobs while a cache of the model holds blocks.
    """
    inner = unwrap(model)
    with patching:
        handle = _patch(inner, PagedConfig(**knobs))
        _borrowers.pop(handle, None)
    _gather(inner, handle)
    return handle


def unpatch(model: nn.Module) -> None:
    """Make a patched model the stock model again; nothing happens to one that is not patched.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: `model` cannot generate.
    """
    inner = unwrap(model)
    with patching:
        handle = _handles.pop(inner, None)
        if handle is not None:
            handle.unpatch()


@contextmanager
def paged(model: nn.Module, **knobs: Any) -> Iterator[PagedHandle]:
    """`patch` for the length of a `with` block.

    Inside another `paged` or on a patched model, the block runs with its own knobs and pools and restores the outer
    ones; caches made inside keep the pools they were made in.

    Args:
        model, **knobs: as for `patch`.

    Raises:
        TypeError, ValueError, RuntimeError: as `patch`, before the block runs.
    """
    inner = unwrap(model)
    with patching:
        outer = _handles.get(inner)
        settings = outer.settings if outer is not None and outer.patched else None
        handle = _patch(inner, PagedConfig(**knobs))
    try:
        _gather(inner, handle)
        yield handle
    finally:
        with patching:
            if settings is None:
                unpatch(inner)
            else:
                handle.settings = settings


class Borrowed:
    """The handle of a model that is patched meanwhile: by its owner, or for all who borrow it at the same time.

    No generator, whose end the cycle collector would run wherever it finds one that nobody has any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __enter__(self) -> PagedHandle:
        with patching:
            handle = handle_of(self._model)
            if handle is None:
                handle = _patch(self._model, PagedConfig())
                _borrowers[handle] = 0
            if handle in _borrowers:
                _borrowers[handle] += 1
        self._handle = handle
        try:
            _gather(self._model, handle)
        except BaseException:
            self.__exit__()
            raise
        return handle

    def __exit__(self, *exception: object) -> None:
        with patching:
            if self._handle in _borrowers:
                _borrowers[self._handle] -= 1
                if not _borrowers[self._handle]:
                    del _borrowers[self._handle]
                    unpatch(self._model)


def _patch(model: PreTrainedModel, config: PagedConfig) -> PagedHandle:
    handle = _handles.get(model)
    if handle is not None and handle.patched:
        handle.reconfigure(config)
        return handle
    handle = PagedHandle(model, config)
    handle.install()
    _handles[model] = handle
    return handle


def _gather(model: PreTrainedModel, handle: PagedHandle) -> None:
    """Not under the lock: others would wait for seconds."""
    if handle.config.huge_pages:
        gather_weights(model)


def handle_of(model: PreTrainedModel) -> PagedHandle | None:
    """The handle of a patched model; None if it is not patched."""
    with patching:
        handle = _handles.get(model)
        return handle if handle is not None and handle.patched else None


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT, data-parallel and compiled wrappers.

    Raises:
        TypeError: there is none.
        ValueError: it has no `generate`.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = wrapped
        else:
            hint = ": pass its .model" if isinstance(getattr(inner, "model", None), PreTrainedModel) else ""
            raise TypeError(f"model: {type(model).__name__}; must be a transformers model or a wrapper of one{hint}")
    if not inner.can_generate():
        raise ValueError(f"model: {type(inner).__name__} has no generate(); must be a model that can generate")
    return inner
