"""The passes that run inside Inductor, with an identity for its cache on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from torch_paged.compile.options import CompileOptions
from torch_paged.compile.rope import fuse_rope
from torch_paged.compile.verify import check_cache_copies

_log = logging.getLogger("torch_paged.compile")
_FILES = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in ("passes", "rope", "rotation", "verify"))


def inductor_passes(options: CompileOptions) -> dict[str, Any]:
    """Return settings of Inductor that run our passes."""
    return {
        "post_grad_custom_pre_pass": _Fusions(options.fuse_rope),
        "post_grad_custom_post_pass": _Verifier(options.cache_copies),
    }


class _Pass(CustomGraphPass):
    """A pass with one option; graphs in Inductor's cache are found by it and by the source of the passes."""

    def __init__(self, option: bool | str) -> None:
        self.option = option

    def uuid(self) -> Any:
        return type(self).__name__, self.option, get_hash_for_files(_FILES)


class _Fusions(_Pass):
    def __call__(self, graph: Graph) -> None:
        if self.option:
            _log.info("%d rotary embeddings fused into cache writes", fuse_rope(graph))


class _Verifier(_Pass):
    def __call__(self, graph: Graph) -> None:
        if self.option != "allow":
            check_cache_copies(graph, str(self.option))
