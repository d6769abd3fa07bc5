"""Linear layers over frozen weights are merged and packed, follow their weights, and are shared between graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_paged.compile import frozen, projections, repack, repack_if_written

from .decoder import Decoder, decode
from .lowered import Lowered

COUNTS = {
    # merge, prepack: products of matrices, packed linear layers. Two layers of q, k, v, out, gate, up and down, a head.
    (True, True): (0, 2 * 4 + 1),
    (True, False): (2 * 4 + 1, 0),
    (False, True): (0, 2 * 7 + 1),
    (False, False): (2 * 7 + 1, 0),
}


@pytest.mark.parametrize(("merge", "prepack"), COUNTS)
@torch.no_grad()
def test_same_tokens(merge: bool, prepack: bool, lowered: Lowered) -> None:
    model = Decoder(bias=True)
    step = torch.compile(
        model, backend="torch_paged", fullgraph=True, options={"merge_projections": merge, "prepack": prepack}
    )
    expected, logits = decode(model, model.new_caches()), decode(step, model.new_caches())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    products = lowered.count("aten.mm") + lowered.count("aten.addmm")
    assert (products, lowered.count("paged.packed_linear")) == COUNTS[merge, prepack]


class Two(nn.Module):
    """Two layers over one input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5, dtype=dtype), nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x), self.b(x)), -1)


@torch.no_grad()
def test_what_weights_were_made_into_takes_their_place(lowered: Lowered) -> None:
    model, x = Two(), torch.randn(4, 6)
    torch.testing.assert_close(torch.compile(model, backend="torch_paged")(x), model(x), atol=1e-6, rtol=1e-5)
    (graph,) = lowered.graphs
    # What is multiplied; eight outputs and their inputs padded to a panel of 32 by three pairs; eight biases.
    shapes = [tuple(node.meta["val"].shape) for node in graph.graph.find_nodes(op="placeholder")]
    assert shapes == [(4, 6), (1, 3, 64), (8,)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each function that made a tensor of weights."""
    names: list[str] = []
    for function in (projections.merged_weights, projections.packed_weights):

        def counting(weights: Sequence[Tensor], function: Any = function) -> Tensor:
            names.append(function.__name__)
            return function(weights)

        monkeypatch.setattr(projections, function.__name__, counting)
    return names


@torch.no_grad()
def test_weights_are_followed(made: list[str]) -> None:
    model = Two()
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="torch_paged")

    def follows() -> bool:
        return torch.allclose(compiled(x), model(x), atol=1e-6)

    assert follows() and follows()
    assert sorted(made) == ["merged_weights", "packed_weights"]
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    assert follows()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for fused in (False, True):
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused).step()
        assert follows()
    model.a.weight.data = torch.randn(5, 6)
    assert follows()
    model.b.weight = nn.Parameter(torch.randn(3, 6))
    assert follows()
    model.b = nn.Linear(6, 3)
    assert follows()
    # Nothing tells of this.
    model.a.weight.data.mul_(2)
    assert not follows()
    repack()
    assert follows()
    # A sample of each weight does, of NaN too.
    model.b.weight.data.add_(1)
    repack_if_written(model.parameters())
    assert follows()
    model.a.weight.data[:, 0] = torch.nan
    repack_if_written(model.parameters())
    assert compiled(x)[:, :5].isnan().all() and not compiled(x)[:, 5:].isnan().any()
    made.clear()
    repack_if_written(model.parameters())
    compiled(x)
    assert made == []


@pytest.mark.parametrize(("dtype", "fast_rows", "copies"), [
    (torch.float32, 64, []), (torch.float32, 65, []), (torch.bfloat16, 65, []),
    (torch.bfloat16, 64, ["packed_weights", "merged_weights"]),
])  # fmt: skip
@torch.no_grad()
def test_prefills_that_keep_no_copy_of_weights(
    dtype: torch.dtype, fast_rows: int, copies: list[str], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`linear` is fast up to so many rows of that dtype, on whatever CPU."""
    monkeypatch.setattr(projections, "most_rows", lambda dtype: fast_rows)
    model = Two(dtype)
    x = torch.randn(65, 6, dtype=dtype)
    torch.testing.assert_close(torch.compile(model, backend="torch_paged")(x), model(x))
    assert made == copies


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_layers_one_behind_the_other(merge: bool, rows: int) -> None:
    """With nothing between them."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 3)), torch.randn(rows, 6)
    compiled = torch.compile(model, backend="torch_paged", options={"merge_projections": merge})
    torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_weights_are_packed_once_for_all_graphs(made: list[str]) -> None:
    model = Two()
    compiled = torch.compile(model, backend="torch_paged", dynamic=False)
    for rows in (1, 2, 1):
        torch.testing.assert_close(compiled(torch.ones(rows, 6)), model(torch.ones(rows, 6)))
    assert sorted(made) == ["merged_weights", "packed_weights"]


@torch.no_grad()
def test_weights_that_another_graph_has_packed_meanwhile() -> None:
    """Through `.data`, which no version tells of: only the address changes, and comes back."""
    model = Two()
    compiled = torch.compile(model, backend="torch_paged", dynamic=False)
    few, more = torch.ones(1, 6), torch.ones(2, 6)
    compiled(few)
    before = model.a.weight.data
    model.a.weight.data = torch.randn_like(before)
    torch.testing.assert_close(compiled(more), model(more))
    model.a.weight.data = before
    torch.testing.assert_close(compiled(few), model(few))


@torch.no_grad()
def test_unchanged_weights_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []

    def kept(sources: Any, make: Any, look_up: Any = frozen._kept) -> Tensor:
        lookups.append(make.__name__)
        return look_up(sources, make)

    monkeypatch.setattr(frozen, "_kept", kept)
    model = Two()
    compiled = torch.compile(model, backend="torch_paged")
    x = torch.ones(1, 6)
    compiled(x)
    lookups.clear()
    compiled(x)
    assert lookups == []
    for change in (lambda: model.b.weight.mul_(2), repack):
        change()
        torch.testing.assert_close(compiled(x), model(x))
        assert set(lookups) == {"merged_weights", "packed_weights"}
        lookups.clear()
        compiled(x)
        assert lookups == []


@torch.no_grad()
def test_one_graph_for_layers_that_look_alike(made: list[str]) -> None:
    """As when a model's layers are compiled one by one: each has its own packed weights."""
    models = [Two(), Two()]
    compiled = torch.compile(Two.forward, backend="torch_paged")
    for model in models * 2:
        torch.testing.assert_close(compiled(model, torch.ones(2, 6)), model(torch.ones(2, 6)))
    assert len(made) == 4


@torch.no_grad()
def test_packed_weights_go_with_their_model() -> None:
    model = Two()
    compiled = torch.compile(model, backend="torch_paged")
    compiled(torch.ones(1, 6))
    packed = [weakref.ref(entry.tensor) for entry in frozen._made[model.a.weight].values()]
    assert len(packed) == 1 and packed[0]() is not None
    torch.compiler.reset()
    del compiled, model
    gc.collect()
    assert packed[0]() is None


@pytest.mark.parametrize("why", ["gradients", "autocast", "float64", "not a weight", "inference tensors"])
def test_left_alone(why: str, lowered: Lowered) -> None:
    with torch.inference_mode(why == "inference tensors"):
        model = Two(torch.float64 if why == "float64" else torch.float32)
    x = torch.ones(2, 6, dtype=model.a.weight.dtype)
    cast = torch.autocast("cpu", torch.bfloat16) if why == "autocast" else nullcontext()
    modes = {"gradients": torch.enable_grad, "inference tensors": torch.inference_mode}
    options = {"merge_projections": False} if why == "float64" else {}
    with cast, modes.get(why, torch.no_grad)():
        if why == "not a weight":
            run = torch.compile(torch.nn.functional.linear, backend="torch_paged")
            torch.testing.assert_close(run(x, torch.ones(3, 6)), torch.full((2, 3), 6.0))
        else:
            out = torch.compile(model, backend="torch_paged", options=options)(x)
            torch.testing.assert_close(out, model(x), atol=0.05 if why == "autocast" else 1e-6, rtol=0)
    assert lowered.count("paged.packed_linear") == 0


@torch.no_grad()
def test_a_view_that_a_part_does_not_allow(lowered: Lowered) -> None:
    """Rows of a merged result lie apart, so that they cannot be viewed as one."""
    a, b = nn.Linear(6, 5), nn.Linear(6, 3)

    def run(x: Tensor) -> Tensor:
        return torch.cat((a(x).view(-1), b(x).flatten()))

    out = torch.compile(run, backend="torch_paged", fullgraph=True)(torch.ones(2, 6))
    torch.testing.assert_close(out, run(torch.ones(2, 6)))
    assert lowered.count("paged.packed_linear") == 2


class Transposed(nn.Module):
    """As transformers' Conv1D in GPT-2: the weight is `[in_features, out_features]`."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], -1)


class TwoTransposed(nn.Module):
    """Two layers over one input, of which the second is 32 wide: its packed form needs no filling up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Transposed(5), Transposed(32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        both = torch.addmm(self.a.bias, rows, self.a.weight), torch.addmm(self.b.bias, rows, self.b.weight)
        return torch.cat((*both, self.a(x).flatten(0, 1)), -1)


@pytest.mark.parametrize(("merge", "prepack", "counts"), [
    (True, True, (0, 2)), (True, False, (2, 0)), (False, True, (0, 3)), (False, False, (3, 0))
])  # fmt: skip
@torch.no_grad()
def test_transposed_weights(merge: bool, prepack: bool, counts: tuple[int, int], lowered: Lowered) -> None:
    model, x = TwoTransposed(), torch.randn(2, 3, 6)
    compiled = torch.compile(
        model, backend="torch_paged", fullgraph=True, options={"merge_projections": merge, "prepack": prepack}
    )
    torch.testing.assert_close(compiled(x), model(x))
    assert (lowered.count("aten.addmm"), lowered.count("paged.packed_linear")) == counts
    # Followed as others are.
    model.a.weight.mul_(2)
    model.b.weight = nn.Parameter(torch.randn(6, 32))
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_sums_that_are_no_linear_layer(lowered: Lowered) -> None:
    """A bias for each row, a scaled product, a matrix that is computed."""
    model, x, rows = Transposed(5), torch.randn(3, 6), nn.Parameter(torch.randn(3, 5))

    def run(x: Tensor) -> Tensor:
        scaled = torch.addmm(model.bias, x, model.weight, alpha=2)
        return torch.addmm(rows, x, model.weight) + scaled + torch.addmm(model.bias, x, model.weight * 2)

    torch.testing.assert_close(torch.compile(run, backend="torch_paged", fullgraph=True)(x), run(x))
    assert lowered.count("paged.packed_linear") == 0


@pytest.mark.parametrize("huge_pages", [True, False])
@torch.no_grad()
def test_what_weights_were_made_into_lies_in_huge_pages(huge_pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[list[tuple[int, ...]]] = []

    def moving(tensors: Sequence[Tensor]) -> int:
        moved.append([tuple(tensor.shape) for tensor in tensors])
        return 0

    monkeypatch.setattr(frozen, "gather_in_huge_pages", moving)
    model, x = Two(), torch.randn(4, 6)
    step = torch.compile(model, backend="torch_paged", options={"huge_pages": huge_pages})
    step(x), step(x)
    assert moved == ([[(1, 3, 64), (8,)]] if huge_pages else [])
    model.a.weight.mul_(2)
    torch.testing.assert_close(step(x), model(x), atol=1e-6, rtol=1e-5)
    assert len(moved) == (2 if huge_pages else 0)
