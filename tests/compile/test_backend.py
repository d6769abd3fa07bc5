"""The backend by its name: found, given options, and without transformers."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import torch_paged
from torch_paged.compile import CompileOptions, compile_graph

from .decoder import Decoder, Step

WITHOUT_TRANSFORMERS = """
import sys
import torch, torch_paged

cache, value_cache = torch_paged.ops.empty_cache(4, 16, 2, 32, dtype=torch.float32, device="cpu")

def store(key):
    torch.ops.paged.reshape_and_cache(key, key, cache, value_cache, torch.tensor([5, 17]))

key = torch.randn(2, 2, 32)
torch.compile(store, backend="torch_paged", fullgraph=True)(key)
assert torch.equal(cache[[0, 1], [5, 1]], key)
assert "transformers" not in sys.modules
"""


def test_registered() -> None:
    assert "torch_paged" in torch._dynamo.list_backends(exclude_tags=())


def test_entry_point() -> None:
    """By which `torch.compile` finds it before anyone has imported torch_paged."""
    [found] = entry_points(group="torch_dynamo_backends", name="torch_paged")
    assert found.load() is compile_graph


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
    with pytest.raises(Exception, match="TypeError: options: fast; must be of fuse_rope, merge_projections, "):
        torch.compile(lambda x: x + 1, backend="torch_paged", options={"fast": True})(torch.ones(2))


def test_wrong_value() -> None:
    with pytest.raises(ValueError, match="cache_copies: 'perhaps'; must be 'raise', 'warn' or 'allow'"):
        CompileOptions(cache_copies="perhaps")  # type: ignore[arg-type]


def test_says_what_fired(caplog: pytest.LogCaptureFixture) -> None:
    model = Decoder()
    with caplog.at_level("INFO", "torch_paged.compile"), torch.no_grad():
        torch.compile(model, backend="torch_paged")(torch.tensor([[1]]), model.new_caches(), Step([1]))
    assert [record.message for record in caplog.records] == [
        "0 nodes compute chosen tokens alone",
        "10 linear layers merged with others, 15 packed, 0 of many rows by ops",
        "2 rotary embeddings fused into cache writes",
    ]


def test_graphs_are_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our passes have an identity by which Inductor finds what it compiled before, and options are a part of it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Decoder("half split")

    def hits(**options: bool) -> int:
        torch.compiler.reset()
        counters.clear()
        with torch.no_grad():
            step = torch.compile(model, backend="torch_paged", options=options or None)
            step(torch.tensor([[1]]), model.new_caches(), Step([1]))
        return counters["inductor"]["fxgraph_cache_hit"]

    with torch._inductor.config.patch(fx_graph_cache=True):
        assert (hits(), hits(), hits(fuse_rope=False)) == (0, 1, 0)
