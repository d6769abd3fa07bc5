"""The backend itself: what `torch.compile(model, backend="torch_paged")` calls with each graph."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from torch_paged.compile.chosen_tokens import choose_early
from torch_paged.compile.cuda_graphs import cuda_graph_settings, is_decode_step
from torch_paged.compile.frozen import Derived, DerivedInputs
from torch_paged.compile.graph_copy import copied
from torch_paged.compile.options import CompileOptions
from torch_paged.compile.projections import freeze_projections

_log = logging.getLogger("torch_paged.compile")


def compile_graph(
    graph: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: CompileOptions | Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that TorchDynamo captured.

    What was done to it is logged at INFO on "torch_paged.compile"; passes inside Inductor do not run, nor log, for a
    graph that Inductor finds in its cache on disk.

    Args:
        graph: the captured graph.
        example_inputs: its inputs, one tensor or symbolic integer each.
        mode: a mode of Inductor: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: see CompileOptions.

    Returns:
        The function that takes the graph's place.

    Raises:
        TypeError: an option does not exist.
        CacheCopied: the compiled graph would copy a paged cache.
    """
    # Inductor takes a second to import, which nobody who compiles nothing shall wait for.
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    from torch_paged.compile.passes import inductor_passes

    options = CompileOptions.of(options)
    graph = copied(graph)
    if options.choose_early:
        _log.info("%d nodes compute chosen tokens alone", choose_early(graph.graph))
    derived = freeze_projections(graph, example_inputs, options)
    inputs = [*example_inputs, *_as_static(derived, example_inputs)]
    used = _drop_unused(graph, inputs)
    inputs = [inputs[place] for place in used]
    settings = {
        # Every input and result compared with what fakes said of it: 0.4 ms of a step of 24 layers.
        "size_asserts": False,
        "alignment_asserts": False,
        **(list_mode_options(mode) if mode else {}),
        **inductor_passes(options),
        **cuda_graph_settings(inputs, options, decodes=is_decode_step(graph.graph)),
        **options.inductor,
    }
    compiled = cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=settings))
    if len(used) == len(example_inputs) and not derived:
        return compiled

    added = DerivedInputs(derived, huge_pages=options.huge_pages)

    def with_derived(*inputs: Any) -> Any:
        inputs += tuple(added.tensors(inputs))
        return compiled(*[inputs[place] for place in used])

    return with_derived


def _drop_unused(graph: GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Remove tensors that nothing reads any more, as are weights that others are made from.

    Each would cost microseconds in every call.

    Returns:
        the places of the inputs that are left.
    """
    used = []
    for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node.users or not isinstance(inputs[place], Tensor):
            used.append(place)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def _as_static(derived: Sequence[Derived], inputs: Sequence[Any]) -> list[Any]:
    """Return what derived tensors look like to the compiler, with sizes that never vary.

    It would guard sizes that may vary, and Dynamo knows of no place to look for them when it checks the guards.
    """
    context = torch._guards.TracingContext.try_get()
    tensors = [each.tensor(inputs) for each in derived]
    if context is None or context.fake_mode is None:
        return tensors
    return [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def inductor_settings(options: CompileOptions | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return settings that run our passes where Inductor is called by another way than this backend.

    Such is `torch._inductor.aoti_compile_and_package(exported, inductor_configs=inductor_settings())`. The passes are
    `fuse_rope` and `cache_copies`: the others are for weights that live outside the graph.
    """
    from torch_paged.compile.passes import inductor_passes

    options = CompileOptions.of(options)
    return {**inductor_passes(options), **options.inductor}


def register() -> None:
    """Make the name "torch_paged" known to `torch.compile` where the installed metadata have no entry point for it.

    Such is a checkout on the path, or an editable install from before there was a backend.
    """
    if not entry_points(group="torch_dynamo_backends", name="torch_paged"):
        torch._dynamo.register_backend(compile_graph, name="torch_paged")
