"""Choosing tokens comes before what computes each token by itself: a prefill's logits are asked of a few."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional

from torch_paged.compile.layers import hint, linear, value_of
from torch_paged.compile.writes import epochs, is_transformed

# Element by element, with what is broadcast over tokens.
_ELEMENTWISE = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, torch.add, torch.sub,
    torch.mul, torch.div, torch.neg, torch.pow, torch.rsqrt, torch.sqrt, torch.tanh, torch.sigmoid, torch.exp,
    functional.silu, functional.relu, torch._C._nn.gelu,
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "tanh", "sigmoid", "exp", "square", "to", "float",
    "half", "bfloat16", "double", "type_as",
}  # fmt: skip
# Over the dimensions in the second argument.
_NORMS = (functional.rms_norm, functional.layer_norm, torch.rms_norm, torch.layer_norm)
# Tokens stand in the second dimension, as in `hidden_states[:, logits_to_keep]`.
_DIM = 1


def choose_early(graph: Graph) -> int:
    """Move the choice of tokens, if a graph has one, to where tokens last see one another.

    Returns:
        how many nodes compute the chosen tokens alone now.
    """
    if is_transformed(graph):
        return 0
    choices = [node for node in graph.find_nodes(op="call_function", target=operator.getitem) if _chooses_few(node)]
    if len(choices) != 1:
        return 0
    (choice,) = choices
    cone = _each_by_itself(graph, choice)
    for node in cone:
        for source in node.all_input_nodes:
            if source not in cone and _has_tokens(source, choice):
                node.replace_input_with(source, _chosen(graph, node, source, choice))
        node.meta["example_value"] = _choose(value_of(node), choice)
    if cone:
        choice.replace_all_uses_with(choice.args[0])
        graph.erase_node(choice)
    return len(cone)


def _chooses_few(node: Node) -> bool:
    """Whether a node is `tensor[:, indices]` with fewer indices than there are tokens, as far as is known."""
    source, index = node.args
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(source, Node):
        return False
    value, indices = value_of(source), index[_DIM]
    others = [part for place, part in enumerate(index) if place != _DIM]
    if any(part != slice(None) for part in others) or not isinstance(indices, Node) or indices.op != "placeholder":
        return False
    places = value_of(indices)
    if not isinstance(value, Tensor) or not isinstance(places, Tensor) or value.dim() < 3:
        return False
    few, all_of_them = hint(places.shape[0]), hint(value.shape[_DIM])
    is_list = places.dim() == 1 and places.dtype == torch.int64
    return is_list and few is not None and all_of_them is not None and few < all_of_them


def _each_by_itself(graph: Graph, choice: Node) -> dict[Node, None]:
    """Return the nodes, in order, whose results nothing but the choice needs, and whose tokens see one another not."""
    when = epochs(graph)
    found = {choice}
    for node in reversed(graph.nodes):
        is_for_it = node.users and all(user in found for user in node.users) and when[node] == when[choice]
        if is_for_it and _has_tokens(node, choice) and _is_by_itself(node, choice):
            found.add(node)
    return {node: None for node in graph.nodes if node in found and node is not choice}


def _has_tokens(node: Node, choice: Node) -> bool:
    """Whether a node's result has the tokens where that has them which is chosen from."""
    value, source = value_of(node), value_of(choice.args[0])
    return isinstance(value, Tensor) and value.dim() == source.dim() and _same(value.shape[_DIM], source.shape[_DIM])


def _is_by_itself(node: Node, choice: Node) -> bool:
    if node.op not in ("call_function", "call_method") or not node.args or "memory_format" in node.kwargs:
        return False
    if node.target in _ELEMENTWISE:
        return all(_has_tokens(source, choice) or _is_small(source, 1) for source in node.all_input_nodes)
    first: Any = node.args[0]
    rest = [source for source in node.all_input_nodes if source is not first]
    if not isinstance(first, Node) or not _has_tokens(first, choice):
        return False
    if node.target is linear:
        bias: Any = node.args[2] if len(node.args) > 2 else None
        return _is_small(node.args[1], 2) and (bias is None or _is_small(bias, 1))
    if node.target in ("mean", torch.mean):
        return _is_over_last(node)
    if node.target is functional.dropout:
        return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is False
    if node.target in _NORMS:
        shape = node.args[1] if len(node.args) > 1 else None
        last = isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 1
        return last and all(_is_small(source, 1) for source in rest)
    return False


def _is_small(node: Any, dims: int) -> bool:
    """Whether a node's result has too few dimensions to know of tokens."""
    value = value_of(node)
    return not isinstance(value, Tensor) or value.dim() <= dims


def _is_over_last(node: Node) -> bool:
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return over in (-1, [-1], (-1,)) and keeps is True


def _chosen(graph: Graph, user: Node, source: Node, choice: Node) -> Node:
    # Where the user reads it: right behind the source, something may write it before.
    with graph.inserting_before(user):
        chosen = graph.call_function(operator.getitem, (source, (slice(None), _indices(choice))))
    chosen.meta["example_value"] = _choose(value_of(source), choice)
    return chosen


def _choose(value: Tensor, choice: Node) -> Tensor:
    return value[:, value_of(_indices(choice))]


def _indices(choice: Node) -> Node:
    indices: Any = choice.args[1]
    found: Node = indices[_DIM]
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, without asking for what was not known to be."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)
