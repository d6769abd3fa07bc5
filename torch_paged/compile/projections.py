"""Linear layers over frozen weights: those that share an input become one, packed where that is faster."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from torch_paged.compile.frozen import Derived
from torch_paged.compile.layers import Layer, hint, linear, run_by_ops, value_of
from torch_paged.compile.options import CompileOptions
from torch_paged.compile.writes import epochs, is_transformed, may_write
from torch_paged.ops import pack_linear_weight
from torch_paged.ops._most_rows import most_rows

_log = logging.getLogger("torch_paged.compile")

# Packed weights are for few rows. With more, `linear` does as well without them where it is fast. Elsewhere MKL is the
# faster one in float32, and packed_linear in bfloat16 (2 threads of a 4th generation Xeon, 896 x 4,864, 128 rows: 276
# against 216 GFLOP/s in float32, 152 against 250 in bfloat16).
_MAX_FEW_ROWS = 64


def freeze_projections(module: GraphModule, inputs: Sequence[Any], options: CompileOptions) -> list[Derived]:
    """Rewrite a graph that Dynamo captured.

    Returns:
        what to call it with on top of its inputs, in the order of its new placeholders.
    """
    graph = module.graph
    places = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    derived: list[Derived] = []
    merged = packed = by_ops = 0
    when = epochs(graph)
    for layers in _sharing_an_input(graph, when, places, inputs):
        if options.prepack and _has_many_rows(layers, places, inputs):
            by_ops += run_by_ops(graph, layers, when)
            continue
        for group in [layers] if options.merge_projections else [[layer] for layer in layers]:
            weight = inputs[places[group[0].weight]]
            pack = options.prepack and _packs(group[0], weight)
            if not pack and (len(group) == 1 or not _merges(group[0], weight)):
                continue
            _replace(module, group, pack, places, inputs, derived)
            merged += len(group) if len(group) > 1 else 0
            packed += len(group) if pack else 0
    graph.lint()
    module.recompile()
    _log.info("%d linear layers merged with others, %d packed, %d of many rows by ops", merged, packed, by_ops)
    return derived


def merged_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return weights or biases one below the other."""
    return _together(weights)


def packed_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return weights one below the other, packed."""
    return pack_linear_weight(_together(weights))


def merged_transposed_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return weights `[in_features, out_features]` as those of one linear layer, `[out_features, in_features]`."""
    return _together([weight.t() for weight in weights])


def packed_transposed_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return weights `[in_features, out_features]` as those of one linear layer, packed."""
    return pack_linear_weight(_together([weight.t() for weight in weights]))


def _together(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])


def _sharing_an_input(
    graph: Graph, when: Mapping[Node, int], places: dict[Node, int], inputs: Sequence[Any]
) -> list[list[Layer]]:
    """Return linear layers over frozen weights, grouped by what they multiply."""
    if torch.is_grad_enabled() or _autocasts(graph) or is_transformed(graph):
        return []
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in filter(None, map(_layer, graph.nodes)):
        if not _is_frozen(layer.weight, places, inputs):
            continue
        if layer.bias is not None and not _is_frozen(layer.bias, places, inputs):
            continue
        value, weight = value_of(layer.rows), inputs[places[layer.weight]]
        if not isinstance(value, Tensor) or value.dtype != weight.dtype or weight.dim() != 2 or value.dim() < 2:
            continue
        if any(hint(size) is None for size in value.shape):
            continue
        if layer.bias is not None and value_of(layer.bias).shape != (layer.out_features,):
            continue
        kind = (weight.dtype, weight.device, layer.bias is None, layer.transposed)
        groups[layer.rows, when[layer.node], kind].append(layer)
    return [group for group in groups.values() if _splits(group)] + [
        [layer] for group in groups.values() if not _splits(group) for layer in group
    ]


def _layer(node: Node) -> Layer | None:
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target is linear:
        return Layer(node, node.args[1], node.args[2] if len(node.args) > 2 else None, False)
    if node.target is torch.addmm:
        bias, _, weight = node.args
        return Layer(node, weight, bias, True)
    return None


def _is_frozen(node: Any, places: dict[Node, int], inputs: Sequence[Any]) -> bool:
    """Whether a node is a parameter or buffer of which PyTorch tells when it changes."""
    if (
        node not in places
        or any(map(may_write, node.users))
        or not node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    ):
        return False
    tensor = inputs[places[node]]
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and tensor.layout == torch.strided


def _autocasts(graph: Graph) -> bool:
    """Whether linear layers may compute in another dtype than that of their weights."""
    inside = any(node.target is torch.amp.autocast_mode._enter_autocast for node in graph.nodes)
    return inside or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _splits(group: list[Layer]) -> bool:
    """Whether the parts of a merged result can be viewed as the layers' own results are."""
    width = sum(layer.out_features for layer in group)
    for node in (layer.node for layer in group):
        sizes = [_known(size) for size in value_of(node).shape]
        part = torch.empty(*sizes[:-1], width, device="meta")[..., : sizes[-1]]
        for user in node.users:
            if user.op == "call_method" and user.target == "view":
                try:
                    part.view([_known(size) for size in value_of(user).shape])
                except RuntimeError:
                    return False
    return True


def _packs(layer: Layer, weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return weight.dtype != torch.float32 or _num_rows(layer) <= _MAX_FEW_ROWS


def _has_many_rows(layers: Sequence[Layer], places: dict[Node, int], inputs: Sequence[Any]) -> bool:
    """Whether layers are of a prefill, and ops of ours run them faster than PyTorch over their weights as they are."""
    first = layers[0]
    weights = [inputs[places[node]] for layer in layers for node in (layer.weight, layer.bias) if node is not None]
    if first.transposed or not all(each.device.type == "cpu" and each.is_contiguous() for each in weights):
        return False
    return _MAX_FEW_ROWS < _num_rows(first) <= most_rows(weights[0].dtype)


def _merges(layer: Layer, weight: Tensor) -> bool:
    """Whether unpacked layers gain by merging what a second copy of their weights costs: not the prefill of a CPU."""
    return weight.device.type != "cpu" or _num_rows(layer) <= _MAX_FEW_ROWS


def _num_rows(layer: Layer) -> int:
    return math.prod(_known(size) for size in value_of(layer.rows).shape[:-1])


def _replace(
    module: GraphModule,
    group: list[Layer],
    pack: bool,
    places: dict[Node, int],
    inputs: Sequence[Any],
    derived: list[Derived],
) -> None:
    graph, rows, transposed = module.graph, group[0].rows, group[0].transposed
    sizes = [layer.out_features for layer in group]

    def new_input(nodes: list[Any], make: Any) -> Node:
        made = Derived(tuple(places[node] for node in nodes), make)
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            node = graph.placeholder(f"frozen_{len(derived)}")
        node._dynamo_source = None
        node.meta["example_value"] = made.tensor(inputs)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        derived.append(made)
        return node

    if transposed:
        make = packed_transposed_weights if pack else merged_transposed_weights
    else:
        make = packed_weights if pack else merged_weights
    weight = new_input([layer.weight for layer in group], make)
    bias = group[0].bias
    if bias is not None and len(group) > 1:
        bias = new_input([layer.bias for layer in group], merged_weights)
    with graph.inserting_before(group[0].node):
        if pack:
            lead = _sizes(graph, rows)
            flat = graph.call_function(torch.ops.aten.reshape.default, (rows, [-1, lead.pop()]))
            out = graph.call_function(torch.ops.paged.packed_linear.default, (flat, weight, bias, sum(sizes)))
            out = graph.call_function(torch.ops.aten.reshape.default, (out, [*lead, sum(sizes)]))
        else:
            out = graph.call_function(linear, (rows, weight, bias))
        first = 0
        for layer, size in zip(group, sizes, strict=True):
            part = out
            if len(group) > 1:
                part = graph.call_function(torch.ops.aten.slice.Tensor, (out, -1, first, first + size))
            first += size
            part.meta["example_value"] = value_of(layer.node)
            layer.node.replace_all_uses_with(part)
    for layer in group:
        graph.erase_node(layer.node)


def _sizes(graph: Graph, node: Any) -> list[Any]:
    """Return the sizes of a node's result, as nodes where they are not known."""
    return [
        size if isinstance(size, int) else graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        for dim, size in enumerate(value_of(node).shape)
    ]


def _known(size: Any) -> int:
    known = hint(size)
    assert known is not None
    return known
