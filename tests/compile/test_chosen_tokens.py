"""Tokens are chosen before what computes each by itself, as far as nothing else needs the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

from .lowered import Lowered

TOKENS, WIDTH = 50, 16
CHOSEN = torch.tensor([3, 49, 3])


class Norm(nn.Module):
    """As Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class Model(nn.Module):
    """Tokens that see one another, then what computes each by itself, and a head for the chosen ones."""

    def __init__(self, behind: Callable[[Any, Tensor], Tensor] | None = None, more: bool = False) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.before, self.norm = Norm(), Norm()
        self.head = nn.Linear(WIDTH, 9)
        self.behind, self.more = behind, more

    def forward(self, x: Tensor, chosen: Tensor) -> Any:
        x = x + self.out(torch.softmax(self.mix(x) @ x.mT, -1) @ x)
        normed = self.before(x)
        x = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        x = self.norm(x)
        if self.behind is not None:
            x = self.behind(self, x)
        logits = self.head(x[:, chosen, :])
        return (logits, x) if self.more else logits


def token_counts(lowered: Lowered) -> list[int]:
    """Of how many tokens each linear layer computes, in order: products of matrices and packed layers."""
    (graph,) = lowered.graphs
    counts = []
    for node in graph.graph.nodes:
        name = str(node.target)
        if name.startswith(("aten.mm.", "aten.addmm.", "paged.")):
            counts.append(int(node.meta["val"].shape[0]))
    return counts


def run(model: Model, chosen: Tensor = CHOSEN, rows: int = 1, **options: Any) -> None:
    x = torch.randn(rows, TOKENS, WIDTH)
    with torch.no_grad():
        compiled = torch.compile(model, backend="torch_paged", fullgraph=True, options={"prepack": False} | options)
        torch.testing.assert_close(compiled(x, chosen), model(x, chosen), atol=1e-5, rtol=1e-5)


def test_chosen_behind_the_last_mixture(lowered: Lowered) -> None:
    run(Model())
    # mix; out, gate and up, down, head; the products of tokens with one another are none of these.
    assert token_counts(lowered) == [TOKENS] + [len(CHOSEN)] * 4


def test_off(lowered: Lowered) -> None:
    run(Model(), choose_early=False)
    assert token_counts(lowered) == [TOKENS] * 4 + [len(CHOSEN)]


def test_rows_beside_one_another(lowered: Lowered) -> None:
    run(Model(), rows=2)
    assert token_counts(lowered) == [2 * TOKENS] + [2 * len(CHOSEN)] * 4


def test_packed_as_few_rows(lowered: Lowered) -> None:
    run(Model(), prepack=True)
    assert lowered.count("paged.packed_linear") == 5


def _running_sum(model: Any, x: Tensor) -> Tensor:
    return x.cumsum(1)


def _mean_of_tokens(model: Any, x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _of_first_token(model: Any, x: Tensor) -> Tensor:
    return x + x[:, :1]


def _position(model: Any, x: Tensor) -> Tensor:
    return x + torch.arange(TOKENS)[:, None]


def _layer_norm_over_tokens(model: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[1:])


SEE_OTHERS = [_running_sum, _mean_of_tokens, _of_first_token, _position, _layer_norm_over_tokens]


@pytest.mark.parametrize("behind", SEE_OTHERS)
def test_tokens_that_see_one_another_later(behind: Callable[[Any, Tensor], Tensor], lowered: Lowered) -> None:
    run(Model(behind))
    assert token_counts(lowered) == [TOKENS] * 4 + [len(CHOSEN)]


def _write(model: Any, x: Tensor) -> Tensor:
    x = x + 0
    kept = x.view(-1)
    kept.mul_(2)
    return x


def test_what_is_written_in_place_is_chosen_from_later(lowered: Lowered) -> None:
    run(Model(_write))
    assert token_counts(lowered) == [TOKENS] * 4 + [len(CHOSEN)]


@pytest.mark.parametrize(
    "behind",
    [
        lambda model, x: functional.rms_norm(x, (WIDTH,), model.norm.weight),
        lambda model, x: functional.layer_norm(x, (WIDTH,), model.norm.weight),
        lambda model, x: 2 * torch.tanh(x / 3) - 1,
        lambda model, x: functional.gelu(x.double()).to(x.dtype),
        lambda model, x: functional.dropout(x, 0.5, False),
        lambda model, x: functional.dropout(x, 0.5, training=False),
    ],
)
def test_functions_of_each_token(behind: Callable[[Any, Tensor], Tensor], lowered: Lowered) -> None:
    run(Model(behind))
    assert token_counts(lowered) == [TOKENS] + [len(CHOSEN)] * 4


def test_what_others_need_is_computed_whole(lowered: Lowered) -> None:
    run(Model(more=True))
    assert token_counts(lowered) == [TOKENS] * 4 + [len(CHOSEN)]


def test_more_chosen_than_there_are_tokens(lowered: Lowered) -> None:
    run(Model(), torch.arange(TOKENS).repeat(2))
    assert token_counts(lowered) == [TOKENS] * 4 + [2 * TOKENS]


def test_any_number_of_tokens_by_one_graph(lowered: Lowered) -> None:
    model = Model()
    compiled = torch.compile(model, backend="torch_paged", fullgraph=True)
    with torch.no_grad():
        for tokens, chosen in ((50, [3, 49, 3]), (70, [1, 2]), (9, [0, -1, 4, 8]), (6, list(range(6)))):
            x, indices = torch.randn(1, tokens, WIDTH), torch.tensor(chosen)
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(indices, 0)
            torch.testing.assert_close(compiled(x, indices), model(x, indices), atol=1e-5, rtol=1e-5)
    assert len(lowered.graphs) == 1


def _aliased_and_written(x: Tensor, chosen: Tensor) -> Tensor:
    x = x + 0
    same = x.float()
    torch.utils.checkpoint.checkpoint(lambda t: t.add_(1), x, use_reentrant=False)
    return same[:, chosen]


def _bias_of_each_token(x: Tensor, chosen: Tensor) -> Tensor:
    return functional.linear(x, torch.ones(5, WIDTH), torch.arange(TOKENS * 5.0).view(TOKENS, 5))[:, chosen]


def _mapped(x: Tensor, chosen: Tensor) -> Tensor:
    result: Tensor = torch.vmap(lambda t: (t * 2)[:, chosen])(x[None])
    return result


def _laid_out(x: Tensor, chosen: Tensor) -> Tensor:
    images = x.view(1, TOKENS, 4, 4).to(memory_format=torch.channels_last) * 2
    return images[:, chosen].reshape(1, -1)


def _of_any_length(x: Tensor, chosen: Tensor) -> Tensor:
    return (x * 2)[:, chosen]


@pytest.mark.parametrize("function", [_aliased_and_written, _bias_of_each_token, _mapped, _laid_out, _of_any_length])
@torch.no_grad()
def test_what_is_no_matter_of_one_token(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, chosen = torch.randn(1, TOKENS, WIDTH), CHOSEN.clone()
    if function is _of_any_length:
        torch._dynamo.decorators.mark_unbacked(chosen, 0)
    compiled = torch.compile(function, backend="torch_paged", fullgraph=True)
    torch.testing.assert_close(compiled(x, chosen), function(x, chosen), atol=1e-5, rtol=1e-5)
