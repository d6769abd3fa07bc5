"""The backend by its name: found, given options, and without transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.compile import CompileOptions, compile_graph

WITHOUT_TRANSFORMERS = """
import sys
import torch, torch_paged

cache, _ = torch_paged.ops.empty_cache(4, 16, 2, 32, dtype=torch.float32, device="cpu")

def store(key):
    torch.ops.paged.reshape_and_cache(key, key, cache, cache.clone(), torch.tensor([5, 17]))

key = torch.randn(2, 2, 32)
torch.compile(store, backend="torch_paged", fullgraph=True)(key)
assert torch.equal(cache[[0, 1], [5, 1]], key)
assert "transformers" not in sys.modules
"""


def test_registered() -> None:
    assert "torch_paged" in torch._dynamo.list_backends(exclude_tags=())


def test_without_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an editable install from before there was one."""
    given: dict[str, object] = {}
    monkeypatch.setattr("torch_paged.compile.backend.entry_points", lambda **select: ())
    monkeypatch.setattr("torch._dynamo.register_backend", lambda function, name: given.update({name: function}))
    torch_paged.compile.register()
    assert given == {"torch_paged": compile_graph}


def test_needs_no_transformers() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], check=True)


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"options": {"inductor": {"max_fusion_size": 7}}}, ("max_fusion_size", 7)),
        ({"options": CompileOptions(inductor={"max_fusion_size": 7})}, ("max_fusion_size", 7)),
        ({"mode": "max-autotune-no-cudagraphs"}, ("max_autotune", True)),
    ],
)
def test_settings_of_inductor(
    given: dict[str, Any], setting: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def compile_fx(graph: object, inputs: list[Tensor], config_patches: dict[str, object]) -> object:
        seen.update(config_patches)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(lambda x: x + 1, backend="torch_paged", **given)(torch.ones(2))
    assert setting in seen.items()


def test_unknown_options() -> None:
    with pytest.raises(Exception, match="TypeError: options: fast; must be of inductor"):
        torch.compile(lambda x: x + 1, backend="torch_paged", options={"fast": True})(torch.ones(2))
