"""What Inductor generates code for: the graph after all passes."""

from __future__ import annotations

import pytest
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule


class Lowered:
    """Collects the graphs that Inductor lowers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[GraphModule] = []
        graphs = self.graphs

        class Collecting(GraphLowering):
            def __init__(self, gm: GraphModule, *args: object, **kwargs: object) -> None:
                graphs.append(gm)
                super().__init__(gm, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr("torch._inductor.compile_fx.GraphLowering", Collecting)

    def count(self, op: str) -> int:
        """How often an op, such as "paged.attention", stands in the graphs."""
        names = [str(node.target) for graph in self.graphs for node in graph.graph.nodes]
        return sum(name.startswith(f"{op}.") for name in names)
