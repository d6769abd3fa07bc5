"""Weights: notices when a model no longer computes the keys and values it computed before."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# What PEFT's layers keep of the adapters they apply, and how strongly.
_ADAPTER_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Weights:
    """What a model computes with at one moment: its parameters and buffers, its adapters, its hooks.

    Tensors are known by identity, storage and version counter, so that whatever PyTorch sees changes them is noticed:
    `load_state_dict`, steps of optimizers, `.to()`, assignments. What is written behind its back (through `.data`, by
    fused optimizers and other kernels) is not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [_Seen(tensor) for tensor in _tensors(model)]
        self._parameters = {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}
        self._switches = _switches(model)

    def hold(self, parameter: Tensor) -> bool:
        """Whether `parameter` was one of the model's."""
        known = self._parameters.get(id(parameter))
        return known is not None and known() is parameter

    def are_those_of(self, model: nn.Module) -> bool:
        """Whether nothing has changed since."""
        pairs = itertools.zip_longest(self._tensors, _tensors(model))
        return all(seen is not None and tensor is not None and seen.still(tensor) for seen, tensor in pairs) and (
            self._switches == _switches(model)
        )


class _Seen:
    """A tensor at one moment. The weak references also keep its address, and its storage's, from being used again."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._facts = _facts(tensor)

    def still(self, tensor: Tensor) -> bool:
        return self._tensor() is tensor and self._facts == _facts(tensor)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return version, storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        yield from _plain(tensor)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors inside one of a wrapper class, as quantised weights are."""
    if tensor.device.type == "meta":
        return
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))


def _switches(model: nn.Module) -> list[Any]:
    """Adapters and hooks of every module that has some; ids of hooks are never used again."""
    switches: list[Any] = []
    for module in model.modules():
        own = module.__dict__
        if hooks := (*own["_forward_hooks"], *own["_forward_pre_hooks"]):
            switches.append(hooks)
        if "_active_adapter" in own or "_disable_adapters" in own:
            switches.append([repr(own.get(name)) for name in _ADAPTER_SWITCHES])
    return switches
