"""Finds paged caches that a compiled graph would copy."""

from __future__ import annotations

import warnings
from typing import Any

from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from torch_paged.compile.graph_copy import copied


class CacheCopied(RuntimeError):
    """A compiled graph would copy a paged cache in each step."""


def check_cache_copies(graph: Graph, action: str) -> None:
    """Raise, or warn, where Inductor could not let an op write a paged cache in place.

    Inductor decides that after all passes it offers to others; so its pass runs on a copy of the graph here.

    Raises:
        CacheCopied: naming the node, what is copied, its bytes and where it stands in the model; `action` is "raise".
    """
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater

    if not any(_writes_a_cache(node) for node in graph.nodes):
        return
    assert graph.owning_module is not None
    trial = copied(graph.owning_module)
    reinplace_inplaceable_ops(FakeTensorUpdater(trial), trial.graph)
    for node in trial.graph.nodes:
        for cache in _copied_caches(node):
            _tell(node, cache, action)


def _writes_a_cache(node: Node) -> bool:
    return node.target is auto_functionalized_v2 and str(node.args[0]).startswith("paged.")


def _copied_caches(node: Node) -> list[Node]:
    """Return the inputs that a write copies first."""
    if not _writes_a_cache(node):
        return []
    bases: Any = node.kwargs["_all_bases"]
    copied = node.meta.get("only_clone_these_tensors", range(len(bases)))
    return [bases[i] for i in copied]


def _tell(node: Node, cache: Node, action: str) -> None:
    value = cache.meta["val"]
    size = value.numel() * value.element_size()
    text = (
        f"{node.name}: {node.args[0]} would copy the cache {cache.name} {list(value.shape)}, {size} bytes, in each "
        "call; it must be a tensor of its own, or a view taken outside the compiled function, and be written once"
    )
    if trace := node.meta.get("stack_trace"):
        text += f"\n{trace.rstrip()}"
    if action == "raise":
        raise CacheCopied(text)
    warnings.warn(text, stacklevel=2)
