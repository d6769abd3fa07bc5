"""compile=True: the backend's passes fire in decode steps of transformers' models, whose tokens stay stock's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import ReinplaceCounters

import torch_paged
from tests.compile.lowered import Lowered

from .causal_types import tiny_causal
from .counting import messages
from .graphs import fresh_dynamo
from .models import assert_same_tokens, batch, generate, twin

PROMPTS = batch([20, 5, 9])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    # What Inductor finds on disk it does not lower.
    no_cache = torch._inductor.config.patch(fx_graph_cache=False)
    with fresh_dynamo(), no_cache, torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.mark.parametrize(("name", "fused", "packed"), [
    # q, k and v, o, gate and up, down, the head.
    ("qwen3", 1, 5),
    # A part of each head is rotated. q, k, v and fc1, dense, fc2, the head.
    ("phi", 1, 4),
    # Neighbours are pairs, in attention code of its own. q, k and v, fc_in with its bias, out_proj, fc_out, the head.
    ("gptj", 1, 5),
    # Positions are learned. Conv1D: c_attn, c_proj, c_fc and c_proj, the head.
    ("gpt2", 0, 5),
])  # fmt: skip
def test_what_fires(
    name: str, fused: int, packed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_causal(name, **{"n_layer" if name.startswith("gpt") else "num_hidden_layers": 1})
    stock = twin(model)
    handle = torch_paged.patch(model, compile=True, block_size=4)
    lowered = Lowered(monkeypatch)
    ReinplaceCounters.clear()
    actual = generate(model, PROMPTS)
    assert_same_tokens(stock, generate(stock, PROMPTS), actual, prompt=PROMPTS)
    writes = lowered.count("paged.rope_and_cache"), lowered.count("paged.reshape_and_cache")
    assert writes == (fused, 1 - fused)
    assert lowered.count("paged.packed_linear") == packed
    assert lowered.count("aten.mm") + lowered.count("aten.addmm") == 0
    assert ReinplaceCounters.get_total_missed_bytes() == 0
    # Weights that are written behind PyTorch's back, as PEFT merges adapters.
    for each in (model, stock):
        for parameter in each.parameters():
            parameter.data.mul_(1.25)
    changed = generate(model, PROMPTS)
    assert not torch.equal(changed, actual)
    assert_same_tokens(stock, generate(stock, PROMPTS), changed, prompt=PROMPTS)
    assert messages(caplog) == [] and handle.stats().blocks_used == 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "mixtral"])
def test_prefills_choose_tokens_before_the_last_mlp(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first one runs uncompiled; decode steps have no others than those that are chosen."""
    model = tiny_causal(name, num_hidden_layers=2)
    stock = twin(model)
    torch_paged.patch(model, compile=True, block_size=4)
    generate(model, PROMPTS, max_new_tokens=2)
    caplog.clear()
    with caplog.at_level("INFO", "torch_paged.compile"):
        actual = generate(model, PROMPTS)
    assert_same_tokens(stock, generate(stock, PROMPTS), actual, prompt=PROMPTS)
    alone = [int(record.message.split()[0]) for record in caplog.records if "chosen tokens" in record.message]
    # The last norm at least; where the experts of a layer see tokens in other places, no more.
    assert len(alone) == 1 and alone[0] > (0 if name == "mixtral" else 10)
