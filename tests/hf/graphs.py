"""A backend of `torch.compile` that counts graphs and how often they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule


class Graphs:
    """Runs graphs as they are.

    Attributes:
        compiled: graphs so far.
        runs: of all of them together.
        paged_runs: of those with paged ops.
        ops: names of the paged ops of the last graph.
    """

    def __init__(self) -> None:
        self.compiled = self.runs = self.paged_runs = 0
        self.ops: list[str] = []

    def __call__(self, graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ops = self.ops = [name.split(".")[1] for name in names if name.startswith("paged.")]

        def run(*args: Any) -> Any:
            self.runs += 1
            self.paged_runs += bool(ops)
            return graph.forward(*args)

        return run


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    """Neither graphs of earlier tests nor theirs left behind."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
