"""Weights of a patched model are moved into large pages: which, when, and not where the knob says no."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import torch_paged
from torch_paged import generate_many
from torch_paged.hf import huge_weights

from .many import prompts
from .models import VOCAB, assert_same_tokens, batch, generate, tiny


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The addresses of each call's tensors."""
    calls: list[list[int]] = []

    def moving(tensors: Iterable[Tensor]) -> int:
        calls.append([tensor.data_ptr() for tensor in tensors])
        return 0

    monkeypatch.setattr(huge_weights, "gather_in_huge_pages", moving)
    return calls


def test_all_weights_once(moved: list[list[int]]) -> None:
    model = tiny("llama")
    handle = torch_paged.patch(model)
    assert moved == [[weight.data_ptr() for weight in model.parameters()]]
    generate(model, batch([5, 9]))
    handle.unpatch()
    assert len(moved) == 1


def test_the_knob(moved: list[list[int]]) -> None:
    model = tiny("llama")
    torch_paged.patch(model, huge_pages=False)
    assert moved == []
    torch_paged.patch(model, huge_pages=True)
    assert len(moved) == 1


def test_once_whichever_way_the_model_is_patched(moved: list[list[int]]) -> None:
    model = tiny("llama")
    for _ in range(2):
        with torch_paged.paged(model):
            pass
        list(generate_many(model, prompts([3, 5]), max_new_tokens=2, eos_token_id=None))
        torch_paged.patch(model)
        torch_paged.unpatch(model)
    assert len(moved) == 1
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch_paged.patch(model)
    assert len(moved) == 2


def test_an_interruption_leaves_nobody_s_model_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: Iterable[Tensor]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(huge_weights, "gather_in_huge_pages", interrupted)
    model = tiny("llama")
    stock = type(model)
    with pytest.raises(KeyboardInterrupt):
        list(generate_many(model, prompts([3, 5]), max_new_tokens=2))
    assert type(model) is stock
    with pytest.raises(KeyboardInterrupt), torch_paged.paged(model):
        pass
    assert type(model) is stock


def test_whatever_the_default_device_is() -> None:
    model = tiny("llama")
    with torch.device("meta"):
        torch_paged.patch(model)


def test_sparse_weights_do_not_keep_a_model_from_being_patched() -> None:
    model = tiny("llama")
    model.sparse = nn.Parameter(torch.eye(3).to_sparse_csr(), requires_grad=False)
    handle = torch_paged.patch(model)
    assert handle.patched
    torch_paged.unpatch(model)
    assert not handle.patched


def test_tokens_are_those_of_stock() -> None:
    """With weights of which some fill pages."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch_paged.paged(model):
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, inputs)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
