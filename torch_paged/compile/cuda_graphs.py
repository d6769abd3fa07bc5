"""When a compiled graph is replayed as a CUDA graph: one for each batch size of a decode step."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from torch_paged.compile.options import CompileOptions

# Copies from and to the CPU, which wait for it.
_UNSAFE = ["paged::swap_blocks"]
_ATTENTION = re.compile(r"paged\.attention(_with_lse)?(\.default)?")


# Inductor's own warning at 8 sizes is meant for sizes that nobody rounds.
_MANY_SIZES = 64


def cuda_graph_settings(inputs: Sequence[Any], options: CompileOptions, *, decodes: bool = False) -> dict[str, Any]:
    """Return settings of Inductor: CUDA graphs for graphs on a GPU, no gradients, one for each combination of sizes.

    A graph whose sizes vary is captured only where it is a decode step, for batch sizes and table widths that callers
    round to few: that of a prefill would be captured anew for almost every prompt. Not measured on hardware yet.

    Args:
        inputs: of the graph, tensors and symbolic integers.
        decodes: every sequence of the graph has one query.
    """
    if not options.cuda_graphs or torch.is_grad_enabled():
        return {}
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    varies = len(tensors) < len(inputs)
    if not any(tensor.device.type == "cuda" for tensor in tensors) or (varies and not decodes):
        return {}
    return {
        "triton.cudagraphs": True,
        "triton.cudagraph_trees": True,
        "triton.cudagraph_skip_dynamic_graphs": not varies,
        "triton.cudagraph_dynamic_shape_warn_limit": _MANY_SIZES,
        # What may not be captured, and what is on a CPU, runs between the captured parts.
        "graph_partition": True,
        "custom_should_partition_ops": _UNSAFE,
    }


def is_decode_step(graph: Graph) -> bool:
    """Whether a graph that Dynamo captured attends, and every sequence has one query wherever it does."""
    lengths = [
        node.kwargs.get("max_query_len", node.args[6] if len(node.args) > 6 else None)
        for node in graph.nodes
        if _ATTENTION.fullmatch(str(node.target))
    ]
    return bool(lengths) and all(length == 1 for length in lengths)
