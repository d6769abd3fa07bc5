"""Layers of a patched model that native passes run by ops of ours, on a CPU, where these are faster than PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torch_paged.hf import gated_mlp, linear, rms_norm, self_attention
from torch_paged.hf.disguise import undisguise

# Given a class of layers, each returns the subclass that knows our op, or None if the op does not compute such layers.
_FAST_CLASSES: tuple[Callable[..., Any], ...] = (
    linear.fast_class,
    gated_mlp.fast_class,
    rms_norm.fast_class,
    self_attention.fast_class,
)


def install(model: nn.Module) -> None:
    """Give the layers of `model` the classes that know our ops; classes that no op computes stay what they are."""
    for module in model.modules():
        for fast_class in _FAST_CLASSES:
            if (cls := fast_class(type(module))) is not None:
                module.__class__ = cls
                break


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if getattr(type(module), "is_fast_layer", False):
            undisguise(module)
