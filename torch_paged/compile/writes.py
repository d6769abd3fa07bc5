"""What graphs that Dynamo captured may write in place: whatever is not known to write nothing."""

from __future__ import annotations

import operator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node
from torch.nn import functional

_IN_PLACE_NAMES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift", "idiv", "iconcat", "setitem", "delitem",
)  # fmt: skip
_IN_PLACE_METHODS = {f"__{name}__" for name in _IN_PLACE_NAMES}
_IN_PLACE_FUNCTIONS = {getattr(operator, name) for name in _IN_PLACE_NAMES if hasattr(operator, name)}
_MODULES = ("torch.nn.functional", "torch.functional", "torch._jit_internal")
# Running statistics; weights with `max_norm`.
_MAY_WRITE = (functional.batch_norm, functional.instance_norm, functional.embedding_bag, torch.batch_norm)
_MAX_NORM = 3  # its place among the arguments of `embedding`


def epochs(graph: Graph) -> dict[Node, int]:
    """Return how many nodes before each one may have written tensors, other than our ops, which write caches."""
    found: dict[Node, int] = {}
    writes = 0
    for node in graph.nodes:
        found[node] = writes
        writes += may_write(node)
    return found


def may_write(node: Node) -> bool:
    """Whether a node may write one of its arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
    return node.op == "call_module" or (node.op == "call_function" and _function_may_write(node))


def is_transformed(graph: Graph) -> bool:
    """Whether a part of a graph runs under a transform of torch.func, which our ops and passes know nothing of."""
    return any(getattr(node.target, "__name__", "").endswith("_increment_nesting") for node in graph.nodes)


def _function_may_write(node: Node) -> bool:
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target.namespace != "paged" and target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]
        return any(each.namespace != "paged" and each._schema.is_mutable for each in overloads)
    name = getattr(target, "__name__", "_")
    if target in _IN_PLACE_FUNCTIONS or target in _MAY_WRITE or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if target is functional.embedding:
        limit = node.args[_MAX_NORM] if len(node.args) > _MAX_NORM else node.kwargs.get("max_norm")
        return limit is not None
    if isinstance(target, FunctionType) and target.__module__ in _MODULES:
        # `inplace` may be given by its place.
        return any(argument is True for argument in node.args[1:])
    return not isinstance(target, BuiltinFunctionType)
