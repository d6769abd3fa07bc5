"""When a compiled graph is replayed as a CUDA graph: one for each batch size of a decode step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_paged.compile.options import CompileOptions

# Copies from and to the CPU, which wait for it.
_UNSAFE = ["paged::swap_blocks"]


def cuda_graph_settings(inputs: Sequence[Any], options: CompileOptions) -> dict[str, Any]:
    """Return settings of Inductor: CUDA graphs for graphs on a GPU whose sizes are all known, no gradients.

    A graph with sizes that vary would be captured again for each of them, as many as there are prompts of a prefill.
    Not measured on hardware yet.
    """
    if not options.cuda_graphs or torch.is_grad_enabled():
        return {}
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    if not any(tensor.device.type == "cuda" for tensor in tensors) or len(tensors) < len(inputs):
        return {}
    return {
        "triton.cudagraphs": True,
        "triton.cudagraph_trees": True,
        "triton.cudagraph_skip_dynamic_graphs": True,
        # What may not be captured, and what is on a CPU, runs between the captured parts.
        "graph_partition": True,
        "custom_should_partition_ops": _UNSAFE,
    }
