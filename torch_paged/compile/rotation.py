"""Recognises a rotary embedding in a graph of ATen ops, in each form in which models write it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Rotation:
    """`x * cos + turned(x) * sin` on the first elements of the last dimension of x, as many as cos has."""

    x: Node
    cos: Node
    sin: Node
    interleaved: bool


def find_rotation(node: Any) -> Rotation | None:
    """Return the rotation whose result a node is, or None where it is none, or something else uses its result."""
    if len(node.users) > 1:
        return None
    if node.target is not aten.cat.default:
        return _whole(node)
    # A rotary size below the head's: the other elements are kept.
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not _is_last(node, dim) or not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    turned, kept = (_without_conversion(part) for part in parts)
    rotation, rest = _whole(turned), _slice(kept)
    if rotation is None or rest is None or len(turned.users) > 1:
        return None
    first = _slice(rotation.x)
    size = _size(rotation.cos)
    if first is None or first[1:] != (0, size, 1) or rest[1:] != (size, _size(rest[0]), 1) or first[0] is not rest[0]:
        return None
    return Rotation(first[0], rotation.cos, rotation.sin, rotation.interleaved)


def _whole(node: Any) -> Rotation | None:
    if node.target is not aten.add.Tensor or node.kwargs or not all(_is(arg, aten.mul.Tensor) for arg in node.args):
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        for turned, sin in _both_ways(crossed):
            found = _turned(turned)
            if found is None:
                continue
            source, interleaved = found
            for x, cos in _both_ways(straight):
                if _without_conversion(x) is _without_conversion(source) and _size(cos) == _size(sin) == _size(x):
                    return Rotation(_without_conversion(x), cos, sin, interleaved)
    return None


def _both_ways(product: Any) -> list[tuple[Any, Any]]:
    a, b = product.args
    return [(a, b), (b, a)] if isinstance(a, Node) and isinstance(b, Node) else []


def _turned(node: Any) -> tuple[Node, bool] | None:
    """Return x, and whether its pairs are interleaved, where a node is x with each pair (a, b) as (-b, a)."""
    if node.target in (aten.reshape.default, aten.view.default):
        return _turned_neighbours(node)
    if not _is(node, aten.cat.default) or not _is_last(node, node.args[1] if len(node.args) > 1 else 0):
        return None
    halves = _negative_and_other(node.args[0])
    if halves is None:
        return None
    (b, b_first, b_last, b_step), (a, a_first, a_last, a_step) = halves
    size = _size(a)
    if a is b and (a_first, a_last, b_first, b_last, a_step, b_step) == (0, size // 2, size // 2, size, 1, 1):
        return a, False
    return None


def _turned_neighbours(node: Any) -> tuple[Node, bool] | None:
    """`stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)`."""
    pairs = node.args[0]
    while _is(pairs, aten.clone.default):
        pairs = pairs.args[0]
    if not _is(pairs, aten.cat.default) or not _is_last(pairs, pairs.args[1] if len(pairs.args) > 1 else 0):
        return None
    parts = pairs.args[0]
    if not all(_is(part, aten.unsqueeze.default) and _is_last(part, part.args[1]) for part in parts):
        return None
    halves = _negative_and_other([part.args[0] for part in parts])
    if halves is None:
        return None
    (b, b_first, b_last, b_step), (a, a_first, a_last, a_step) = halves
    size = _size(a)
    if a is not b or (a_first, b_first, a_step, b_step) != (0, 1, 2, 2) or min(a_last, b_last) < size - 1:
        return None
    return (a, True) if node.meta["val"].shape == a.meta["val"].shape else None


def _negative_and_other(parts: Any) -> tuple[tuple[Node, int, int, int], tuple[Node, int, int, int]] | None:
    if len(parts) != 2 or not _is(parts[0], aten.neg.default):
        return None
    negative, other = _slice(parts[0].args[0]), _slice(parts[1])
    return None if negative is None or other is None else (negative, other)


def _slice(node: Any) -> tuple[Node, int, int, int] | None:
    """Return what a node is a slice of in its last dimension, and the slice's first, last and step."""
    if _is(node, operator.getitem) and _is(node.args[0], aten.split.Tensor):
        source, length, *dim = node.args[0].args
        first = node.args[1] * length
        return (source, first, min(first + length, _size(source)), 1) if _is_last(source, *dim or [0]) else None
    if not _is(node, aten.slice.Tensor):
        return None
    arguments: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    source, dim, first, last, step = arguments
    if not _is_last(node, dim) or not all(isinstance(each, (int, type(None))) for each in (first, last, step)):
        return None
    size = _size(source)
    return source, first or 0, size if last is None or last >= size else last, step


def _without_conversion(node: Any) -> Any:
    return node.args[0] if _is(node, prims.convert_element_type.default) else node


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _is_last(node: Any, dim: Any) -> bool:
    return dim in (-1, node.meta["val"].dim() - 1)


def _size(node: Any) -> int:
    return int(node.meta["val"].shape[-1])
