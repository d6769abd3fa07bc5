"""Linear layers of many rows on a CPU run by ops over the weights as they are, gated MLPs by one for both factors."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from torch_paged.compile import projections

from .lowered import Lowered

ROWS = 100


@pytest.fixture(autouse=True)
def _as_fast_at_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CPU this is."""
    monkeypatch.setattr(projections, "most_rows", lambda dtype: sys.maxsize)


class Gated(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], bias: bool = False, width: int = 40) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(24, 40, bias=bias), nn.Linear(24, width, bias=bias)
        self.down = nn.Linear(40, 24, bias=bias)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.combine(self.gate(x), self.up(x)))
        return down


def counts(lowered: Lowered) -> dict[str, int]:
    ops = ("paged.gated_linear", "paged.linear", "paged.packed_linear", "aten.mm", "aten.addmm")
    return {op: count for op in ops if (count := lowered.count(op))}


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: functional.silu(gate) * up,
    "the other way around": lambda gate, up: up * functional.silu(gate),
    "module": lambda gate, up: torch.mul(nn.SiLU()(gate), up),
    "gelu": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exact gelu": lambda gate, up: functional.gelu(gate) * up,
    "relu": lambda gate, up: functional.relu(gate) * up,
    "sum": lambda gate, up: functional.silu(gate) + up,
    "of itself": lambda gate, up: functional.silu(gate) * gate + up,
    "activated twice": lambda gate, up: functional.silu(gate) * up + functional.silu(gate),
    "used again": lambda gate, up: functional.silu(gate) * up + up,
    "product used": lambda gate, up: functional.silu(gate) * (up + 1),
    "both activated": lambda gate, up: functional.silu(gate) * functional.silu(up),
}


def check(model: Gated, lowered: Lowered, dtype: torch.dtype, expected: dict[str, int]) -> None:
    model = model.to(dtype)
    x = torch.randn(ROWS, 24, dtype=dtype)
    with torch.no_grad():
        actual = torch.compile(model, backend="torch_paged", fullgraph=True)(x)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(actual, model(x), atol=tolerance, rtol=tolerance)
    assert counts(lowered) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("combine", GATED.values(), ids=GATED)
def test_gated(combine: Callable[[Tensor, Tensor], Tensor], bias: bool, dtype: torch.dtype, lowered: Lowered) -> None:
    check(Gated(combine, bias), lowered, dtype, {"paged.gated_linear": 1, "paged.linear": 1})


@pytest.mark.parametrize("combine", OTHERS.values(), ids=OTHERS)
def test_what_is_no_gated_mlp(combine: Callable[[Tensor, Tensor], Tensor], lowered: Lowered) -> None:
    check(Gated(combine), lowered, torch.float32, {"paged.linear": 3})


def test_a_factor_that_is_broadcast(lowered: Lowered) -> None:
    check(Gated(GATED["silu"], width=1), lowered, torch.float32, {"paged.linear": 3})


def test_rows_of_any_shape(lowered: Lowered) -> None:
    model, x = Gated(GATED["silu"]), torch.randn(4, 30, 24)
    with torch.no_grad():
        actual = torch.compile(model, backend="torch_paged", fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), atol=1e-5, rtol=1e-5)
    assert counts(lowered) == {"paged.gated_linear": 1, "paged.linear": 1}


def test_any_number_of_rows_by_one_graph(lowered: Lowered) -> None:
    model = Gated(GATED["silu"])
    compiled = torch.compile(model, backend="torch_paged", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (ROWS, 300, 2, 77):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert counts(lowered) == {"paged.gated_linear": 1, "paged.linear": 1}


def test_weights_are_read_where_they_are(lowered: Lowered) -> None:
    model, x = Gated(GATED["silu"]), torch.randn(ROWS, 24)
    compiled = torch.compile(model, backend="torch_paged", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        model.up.weight.data.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert counts(lowered) == {"paged.gated_linear": 1, "paged.linear": 1}


@torch.no_grad()
def test_few_rows_meet_packed_weights(lowered: Lowered) -> None:
    torch.compile(Gated(GATED["silu"]), backend="torch_paged")(torch.randn(64, 24))
    assert counts(lowered) == {"paged.packed_linear": 2}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, {"paged.packed_linear": 2}), (torch.float32, {"aten.mm": 3})],
)
@torch.no_grad()
def test_where_the_ops_are_not_faster(
    dtype: torch.dtype, expected: dict[str, int], lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "most_rows", lambda dtype: 64)
    torch.compile(Gated(GATED["silu"]).to(dtype), backend="torch_paged")(torch.randn(ROWS, 24, dtype=dtype))
    assert counts(lowered) == expected


@torch.no_grad()
def test_off(lowered: Lowered) -> None:
    options = {"prepack": False}
    torch.compile(Gated(GATED["silu"]), backend="torch_paged", options=options)(torch.randn(ROWS, 24))
    assert counts(lowered) == {"aten.mm": 3}


class OverChangedInput(nn.Module):
    """The input is another one for the second layer, or where the product stands."""

    def __init__(self, change: Callable[[Tensor], object], at_the_end: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
        self.change, self.at_the_end = change, at_the_end

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        gate = self.gate(x)
        if not self.at_the_end:
            self.change(x)
        up = self.up(x)
        if self.at_the_end:
            self.change(x)
        return functional.silu(gate) * up


def _set_item(x: Tensor) -> None:
    x[0] = 3.0


def _add(x: Tensor) -> None:
    x += 1


def _normalized_rows(x: Tensor) -> None:
    functional.embedding(torch.tensor([0, 3]), x, max_norm=0.1)


def _by_numpy(x: Tensor) -> None:
    x.numpy()[0] = 1


def _in_checkpoint(x: Tensor) -> None:
    checkpoint(lambda t: t.add_(1), x, use_reentrant=False)


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "method": lambda x: x.mul_(2),
    "of a view": lambda x: x[:3].zero_(),
    "item": _set_item,
    "operator": _add,
    "out": lambda x: torch.mul(x, 2, out=x),
    "functional": lambda x: functional.relu(x, inplace=True),
    "by place": lambda x: functional.relu(x, True),
    "function": lambda x: torch.relu_(x),
    "op": lambda x: torch.ops.aten.mul_(x, 2),
    "overload": lambda x: torch.ops.aten.mul_.Tensor(x, 2),
    "method of an operator": lambda x: x.__imul__(2),
    "embedding": _normalized_rows,
    "numpy": _by_numpy,
    "checkpoint": _in_checkpoint,
}


@pytest.mark.parametrize("rows", [4, ROWS])
@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@torch.no_grad()
def test_an_input_that_is_written_in_place(change: Callable[[Tensor], object], at_the_end: bool, rows: int) -> None:
    model, x = OverChangedInput(change, at_the_end), torch.randn(rows, 24)
    compiled = torch.compile(model, backend="torch_paged", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def _strided_weight(model: Gated) -> None:
    model.up.weight = nn.Parameter(model.up.weight.t().contiguous().t())


def _expanded_bias(model: Gated) -> None:
    model.up.bias = nn.Parameter(torch.randn(1).expand(40))


def _strided_bias(model: Gated) -> None:
    model.gate.bias = nn.Parameter(torch.randn(80)[::2])


@pytest.mark.parametrize("change", [_strided_weight, _expanded_bias, _strided_bias])
@torch.no_grad()
def test_weights_that_the_ops_do_not_take(change: Callable[[Gated], None]) -> None:
    """Of a layer that is not the first one of its input."""
    model, x = Gated(GATED["silu"], bias=True), torch.randn(ROWS, 24)
    change(model)
    compiled = torch.compile(model, backend="torch_paged", options={"merge_projections": False})
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_that_are_a_part_of_a_merged_result(lowered: Lowered) -> None:
    """Merged as their weights are transposed, while the layer behind one of them runs by the op."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16)) for _ in range(2))
            self.bias = nn.Parameter(torch.randn(16, dtype=torch.bfloat16))
            self.last = nn.Linear(16, 8, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.view(-1, 24)
            first = torch.addmm(self.bias, flat, self.a).view(2, -1, 16)
            last: Tensor = self.last(first)
            return last + torch.addmm(self.bias, flat, self.b).view(2, -1, 16)[..., :8]

    model, x = Behind(), torch.randn(2, 50, 24, dtype=torch.bfloat16)
    actual = torch.compile(model, backend="torch_paged", fullgraph=True)(x)
    torch.testing.assert_close(actual, model(x), atol=0.1, rtol=0.05)
    assert counts(lowered) == {"paged.linear": 1, "paged.packed_linear": 1}


@pytest.mark.parametrize("rows", [4, ROWS])
@torch.no_grad()
def test_a_weight_that_is_written_in_the_graph(rows: int) -> None:
    def twice(x: Tensor) -> Tensor:
        first = layer(x)
        layer.weight.mul_(2)
        second: Tensor = first + layer(x)
        return second

    layer, x = nn.Linear(24, 40), torch.randn(rows, 24)
    weight = layer.weight.clone()
    expected = twice(x)
    layer.weight.copy_(weight)
    torch.testing.assert_close(torch.compile(twice, backend="torch_paged")(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [4, ROWS])
@torch.no_grad()
def test_gradients_within_the_graph(rows: int) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(rows, 24)

    def gradient(x: Tensor) -> Tensor:
        result: Tensor = torch.func.grad(lambda t: layer(t).square().sum())(x)
        return result

    compiled = torch.compile(gradient, backend="torch_paged", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sizes_that_nobody_knows() -> None:
    layer, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    compiled = torch.compile(layer, backend="torch_paged", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
