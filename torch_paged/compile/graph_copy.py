"""A copy of a graph module that may be changed while the original stays as it is."""

from torch.fx import Graph, GraphModule, Node


def copied(module: GraphModule) -> GraphModule:
    """Return a module with the same attributes and a graph of its own; nodes share what their metadata hold."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, nodes))
    for original, node in nodes.items():
        node.meta = dict(original.meta)
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    copy = GraphModule(module, graph)
    copy.meta = dict(module.meta)
    # AOTAutograd knows a graph of Dynamo's by this.
    if hasattr(module, "_param_name_to_source"):
        copy._param_name_to_source = module._param_name_to_source
    return copy
