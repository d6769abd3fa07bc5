"""Linear layers as a graph has them, and ops that run them over the weights as they are: those of many rows."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

linear = torch._C._nn.linear
_PRODUCTS = (operator.mul, torch.mul)
_paged = torch.ops.paged


@dataclass(frozen=True)
class Layer:
    """A linear layer as a graph has it.

    Attributes:
        node: its result.
        weight: `[out_features, in_features]`, or the other way around.
        bias: `[out_features]`.
        transposed: weight is `[in_features, out_features]`, as in transformers' Conv1D.
    """

    node: Node
    weight: Any
    bias: Any
    transposed: bool

    @property
    def rows(self) -> Any:
        """What it multiplies, `[..., in_features]`: another node once that was replaced."""
        return self.node.args[1 if self.transposed else 0]

    @property
    def out_features(self) -> int:
        return int(value_of(self.weight).shape[1 if self.transposed else 0])


def run_by_ops(graph: Graph, layers: Sequence[Layer], when: Mapping[Node, int]) -> int:
    """Replace layers that share an input: a gate and what it is multiplied with by `gated_linear`, others by `linear`.

    Args:
        when: of `writes.epochs`.

    Returns:
        how many were replaced.
    """
    left = {layer.node: layer for layer in layers}
    for gate in layers:
        product, activation = _gated(gate)
        other = left.get(_other_factor(product, gate)) if product is not None else None
        if product is None or other is None or len(other.node.users) > 1 or other.out_features != gate.out_features:
            continue
        if when[product] != when[gate.node]:
            continue
        arguments = (
            _contiguous(graph, product, gate.rows),
            gate.weight,
            other.weight,
            gate.bias,
            other.bias,
            activation,
        )
        _replace(graph, product, _paged.gated_linear.default, arguments)
        activated = _only_user(gate.node)
        graph.erase_node(activated)
        for layer in (gate, other):
            graph.erase_node(left.pop(layer.node).node)
    for layer in left.values():
        rows = _contiguous(graph, layer.node, layer.rows)
        _replace(graph, layer.node, _paged.linear.default, (rows, layer.weight, layer.bias))
    return len(layers)


def value_of(node: Any) -> Any:
    """Return what Dynamo saw there: a fake tensor, or a number."""
    return node.meta.get("example_value")


def hint(size: Any) -> int | None:
    """Return a size, or what it was when the graph was captured; None where nobody knows."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def _gated(layer: Layer) -> tuple[Node | None, str]:
    """Return the product that a layer is one factor of behind an activation, and the activation's name."""
    activated = _only_user(layer.node)
    name = "" if activated is None else _activation(activated)
    product = _only_user(activated) if name else None
    is_product = product is not None and product.target in _PRODUCTS and not product.kwargs
    return (product, name) if is_product else (None, "")


def _other_factor(product: Node, gate: Layer) -> Any:
    factors = [factor for factor in product.args if factor is not _only_user(gate.node)]
    return factors[0] if len(factors) == 1 else None


def _activation(node: Node) -> str:
    """Return the name that `gated_linear` has for it, or nothing."""
    if node.target is functional.silu and not node.kwargs.get("inplace"):
        return "silu"
    if node.target is torch._C._nn.gelu and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return ""


def _only_user(node: Node | None) -> Any:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _contiguous(graph: Graph, before: Node, rows: Any) -> Node:
    """Rows as the ops take them: what a merged layer is split into is not contiguous."""
    with graph.inserting_before(before):
        contiguous = graph.call_method("contiguous", (rows,))
    contiguous.meta["example_value"] = value_of(rows)
    return contiguous


def _replace(graph: Graph, node: Node, op: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        out = graph.call_function(op, arguments)
    out.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
