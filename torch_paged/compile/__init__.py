"""The `torch.compile` backend "torch_paged": passes over graphs with paged ops, then Inductor."""

from torch_paged.compile.backend import compile_graph, inductor_settings, register
from torch_paged.compile.frozen import repack, repack_if_written
from torch_paged.compile.options import CompileOptions

__all__ = ["CompileOptions", "compile_graph", "inductor_settings", "register", "repack", "repack_if_written"]
