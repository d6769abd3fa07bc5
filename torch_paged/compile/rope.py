"""Fuses a rotary embedding, written in PyTorch, with the cache write after it: reshape_and_cache to rope_and_cache."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from torch_paged.compile.rotation import Rotation, find_rotation

aten, paged = torch.ops.aten, torch.ops.paged

_ATTENTION = (paged.attention.default, paged.attention_with_lse.default)
_LAYOUT = (aten.reshape.default, aten.view.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim)
_VALUE = (aten.clone.default, torch.ops.prims.convert_element_type.default)


# What layers share: cos or sin for tokens, by the node and by how the rows are laid out.
_Angles = dict[tuple[Node, str, str], Node]


@dataclass(frozen=True)
class _Rows:
    """The rows that an op takes, `[tokens, heads, head_dim]`: a rotation, and what lays it out, last step first."""

    rotation: Rotation
    layout: tuple[Any, ...]


def fuse_rope(graph: Graph) -> int:
    """Replace each cache write whose key was rotated by the op that rotates the key and the query of its attention.

    Returns:
        how many were replaced.
    """
    fused = 0
    angles: _Angles = {}
    for write in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
        if write.args[0] is paged.reshape_and_cache.default:
            fused += _fuse(graph, write, angles)
    if fused:
        graph.eliminate_dead_code()
    return fused


def _fuse(graph: Graph, write: Any, angles: _Angles) -> bool:
    written: dict[Any, Node] = {node.args[1]: node for node in write.users if node.target is operator.getitem}
    attention = _attention_over(written)
    if attention is None:
        return False
    key, query = _rows(write.kwargs["key"]), _rows(attention.args[0])
    if key is None or query is None or not _turn_alike(key, query):
        return False
    # Inductor sorts nodes by their use: the query may come to be after the write, which then moves down to it.
    order = {node: place for place, node in enumerate(graph.nodes)}
    users = {user for node in written.values() for user in node.users}
    if min(map(order.__getitem__, users)) < order[attention]:
        return False
    with graph.inserting_before(attention):
        cos, sin = (_for_tokens(graph, angle, key, angles) for angle in (key.rotation.cos, key.rotation.sin))
        arguments: dict[str, Any] = {
            **write.kwargs,
            "query": _laid_out(graph, query.rotation.x, query),
            "key": _laid_out(graph, key.rotation.x, key),
            "cos": cos,
            "sin": sin,
            "interleaved": key.rotation.interleaved,
        }
        both = graph.call_function(auto_functionalized_v2, (paged.rope_and_cache.default,), arguments)
        caches = write.meta["val"][1:]
        turned = arguments["query"].meta["val"]
        both.meta["val"] = (turned.new_empty(turned.shape), *caches)
        parts = [graph.call_function(operator.getitem, (both, i)) for i in range(1 + len(caches))]
    for node, value in zip(parts, both.meta["val"], strict=True):
        node.meta["val"] = value
    for place, node in written.items():
        node.replace_all_uses_with(parts[place])
        graph.erase_node(node)
    attention.update_arg(0, parts[0])
    graph.erase_node(write)
    return True


def _attention_over(written: dict[Any, Node]) -> Any:
    """Return the attention that reads the cache as this write left it, if there is one and no more."""
    readers = [user for node in written.values() for user in node.users if user.target in _ATTENTION]
    distinct = list(dict.fromkeys(readers))
    return distinct[0] if len(distinct) == 1 else None


def _rows(node: Any) -> _Rows | None:
    """Walk back from an op's rows to the rotation; None where anything else uses the rotated rows."""
    layout = []
    dtype = node.meta["val"].dtype
    while (lays_out := _lays_out(node)) or node.target in _VALUE:
        if len(node.users) > 1:
            return None
        if lays_out:
            layout.append(node)
        node = node.args[0]
    rotation = find_rotation(node)
    if rotation is None or rotation.x.meta["val"].dtype != dtype:
        return None
    if rotation.cos.meta["val"].dtype not in (dtype, torch.float32):
        return None
    return _Rows(rotation, tuple(layout))


def _lays_out(node: Any) -> bool:
    """Whether a node has the rows of its input, and all of them, in another shape or order."""
    if node.target is aten.select.int:
        shape, dim = node.args[0].meta["val"].shape, node.args[1]
        return dim not in (-1, len(shape) - 1) and isinstance(shape[dim], int) and shape[dim] == 1
    return node.target in _LAYOUT


def _turn_alike(key: _Rows, query: _Rows) -> bool:
    """Whether one op can turn both: the same angles, the same pairs, tokens in the same order, one angle a token."""
    k, q = key.rotation, query.rotation
    if k.interleaved != q.interleaved or not (_same(k.cos, q.cos) and _same(k.sin, q.sin)):
        return False
    if k.cos.meta["val"].shape != k.sin.meta["val"].shape or k.cos.meta["val"].dtype != k.sin.meta["val"].dtype:
        return False
    dims = [dim for dim in map(_head_dim, (key, query)) if dim is not None]
    if len(set(dims)) > 1:
        return False
    if dims:
        # Counted from the last dimension, as broadcasting counts.
        shape = k.cos.meta["val"].shape
        if len(shape) >= -dims[0] and shape[dims[0]] != 1:
            return False
    return _token_places(key, dims) == _token_places(query, dims)


def _same(a: Any, b: Any, depth: int = 12) -> bool:
    """Whether nodes, or arguments of nodes, are the same values: GPT-J spreads its angles for query and key apart."""
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and bool(a == b)
    if depth == 0 or a.target is not b.target or not isinstance(a.target, OpOverload) or a.kwargs != b.kwargs:
        return False
    if a.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in a.target.tags:
        return False
    (of_a, like_a), (of_b, like_b) = tree_flatten(a.args), tree_flatten(b.args)
    return like_a == like_b and all(_same(x, y, depth - 1) for x, y in zip(of_a, of_b, strict=True))


def _head_dim(rows: _Rows) -> int | None:
    """Return which dimension of the rotated tensor holds the heads, from the last one; None for a single head."""
    places = _places(rows)
    if places.shape[1] == 1:
        return None
    step = int(places[0, 1] - places[0, 0]) if len(places) else 0
    shape = _sizes(rows)[:-1]
    for dim in range(len(shape)):
        if shape[dim] == places.shape[1] and step == _product(shape[dim + 1 :]):
            return dim - len(shape) - 1
    return 0


def _token_places(rows: _Rows, head_dims: list[int]) -> list[tuple[int, ...]]:
    """Return, for each token, where in the rotated tensor it is, heads aside."""
    shape = _sizes(rows)[:-1]
    head = len(shape) + 1 + head_dims[0] if head_dims else -1
    coordinates = list(itertools.product(*map(range, shape)))
    tokens = [coordinates[int(place)] for place in _places(rows)[:, 0]]
    return [tuple(c for dim, c in enumerate(token) if dim != head) for token in tokens]


def _places(rows: _Rows) -> Tensor:
    """Return `[tokens, heads]`: the place of each row in the rotated tensor, found by laying out numbers."""
    shape = _sizes(rows)[:-1]
    numbers = torch.arange(_product(shape)).view(*shape, 1)
    for node in reversed(rows.layout):
        arguments = map_arg(node.args[1:], lambda n: _hint(n.meta["val"]))
        numbers = node.target(numbers, *_with_last_size(node, arguments, 1))
    return numbers[..., 0]


def _laid_out(graph: Graph, node: Node, rows: _Rows, last: Any = None) -> Node:
    for step in reversed(rows.layout):
        arguments = step.args[1:] if last is None else _with_last_size(step, step.args[1:], last)
        node = _call(graph, step.target, node, *arguments)
    return node


def _for_tokens(graph: Graph, angle: Node, rows: _Rows, angles: _Angles) -> Node:
    """Return cos or sin as `[tokens, rotary_dim]`: as it is broadcast to the rotated tensor, of the first head."""
    x, last = rows.rotation.x, angle.meta["val"].shape[-1]
    alike = angle, str(x.meta["val"].shape), str([(step.target, step.args[1:]) for step in rows.layout])
    if alike not in angles:
        sizes = [
            size if isinstance(size, int) else _call(graph, aten.sym_size.int, x, dim)
            for dim, size in enumerate(x.meta["val"].shape[:-1])
        ]
        broadcast = _call(graph, aten.expand.default, angle, [*sizes, last])
        angles[alike] = _call(graph, aten.select.int, _laid_out(graph, broadcast, rows, last), 1, 0)
    return angles[alike]


def _with_last_size(node: Node, arguments: Any, last: int) -> list[Any]:
    """Return the arguments of a step of layout for a tensor with another last dimension, which all steps keep."""
    if node.target in (aten.reshape.default, aten.view.default):
        return [[*arguments[0][:-1], last]]
    return list(arguments)


def _call(graph: Graph, target: Any, *arguments: Any) -> Node:
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*map_arg(arguments, lambda n: n.meta["val"]))
    return node


def _sizes(rows: _Rows) -> list[int]:
    return [_hint(size) for size in rows.rotation.x.meta["val"].shape]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
