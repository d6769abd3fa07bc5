"""The backend itself: what `torch.compile(model, backend="torch_paged")` calls with each graph."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from torch_paged.compile.options import CompileOptions


def compile_graph(
    graph: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: CompileOptions | Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that TorchDynamo captured.

    Args:
        graph: the captured graph, which may be changed.
        example_inputs: its inputs, one tensor or symbolic integer each.
        mode: a mode of Inductor: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: see CompileOptions.

    Returns:
        The function that takes the graph's place.

    Raises:
        TypeError: an option does not exist.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = CompileOptions.of(options)
    patches = {**(list_mode_options(mode) if mode else {}), **options.inductor}
    return cast(Callable[..., Any], compile_fx(graph, list(example_inputs), config_patches=patches))


def register() -> None:
    """Make the name "torch_paged" known to `torch.compile` where the installed metadata have no entry point for it.

    Such is a checkout on the path, or an editable install from before there was a backend.
    """
    if not entry_points(group="torch_dynamo_backends", name="torch_paged"):
        torch._dynamo.register_backend(compile_graph, name="torch_paged")
