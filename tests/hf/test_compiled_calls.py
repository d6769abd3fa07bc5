"""Calls of a compiled model without generate, and calls that run uncompiled: right in each case, and told of once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import torch_paged

from .causal_types import tiny_causal
from .counting import messages
from .graphs import Graphs, fresh_dynamo
from .models import assert_same_tokens, batch, generate, tiny, twin

RAGGED = batch([20, 5, 9])
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    with fresh_dynamo():
        yield


@torch.no_grad()
def decode(run: Callable[..., Any], cache: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """A loop of one's own: logits `[rows, STEPS, vocabulary]` of greedy steps behind a prompt."""
    logits = []
    for _ in range(STEPS):
        logits.append(run(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


def _wrapper(model: PreTrainedModel, graphs: Graphs, **options: Any) -> Any:
    torch_paged.patch(model, strict=True, block_size=4)
    return torch.compile(model, backend=graphs, **options)


def _wrapper_in_full(model: PreTrainedModel, graphs: Graphs) -> Any:
    return _wrapper(model, graphs, fullgraph=True)


def _function(model: PreTrainedModel, graphs: Graphs) -> Any:
    torch_paged.patch(model, strict=True, block_size=4)
    return torch.compile(lambda **inputs: model(**inputs), backend=graphs)


def _compile(model: PreTrainedModel, graphs: Graphs) -> Any:
    torch_paged.patch(model, strict=True, block_size=4)
    model.compile(backend=graphs, fullgraph=True)
    return model


def _forward(model: PreTrainedModel, graphs: Graphs) -> Any:
    torch_paged.patch(model, strict=True, block_size=4)
    model.forward = torch.compile(model.forward, backend=graphs, fullgraph=True)
    return model


def _knob(model: PreTrainedModel, graphs: Graphs) -> Any:
    torch_paged.patch(model, strict=True, block_size=4, compile={"backend": graphs})
    return model


@pytest.mark.parametrize("how", [_wrapper, _wrapper_in_full, _function, _compile, _forward, _knob])
def test_decoding_without_generate(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_causal("llama", num_hidden_layers=1)
    stock, graphs = twin(model), Graphs()
    prompts = batch([12, 12])["input_ids"]
    run = how(model, graphs)
    for _ in range(2):
        cache = torch_paged.PagedCache(model.config, block_size=4)
        expected = decode(stock, DynamicCache(config=model.config), prompts)
        torch.testing.assert_close(decode(run, cache, prompts), expected, atol=1e-4, rtol=1e-4)
        # Twelve tokens of the prompt and all but the last one of the others, in two rows.
        assert cache.get_seq_length() == 16 and cache.stats().blocks_used == 2 * 4
    assert graphs.paged_runs >= 2 * (STEPS - 1) and sorted(graphs.ops) == ["attention", "reshape_and_cache"]
    assert messages(caplog) == []
    # Without blocks the model is stock.
    torch.testing.assert_close(run(input_ids=prompts).logits, stock(input_ids=prompts).logits, atol=1e-4, rtol=1e-4)


def test_a_wrapper_from_before_the_patch(caplog: pytest.LogCaptureFixture) -> None:
    """It holds stock's call, which does not announce what the cache is to store."""
    model = tiny_causal("llama", num_hidden_layers=1)
    stock = twin(model)
    wrapper = torch.compile(model, backend=Graphs())
    torch_paged.patch(wrapper)
    prompts = batch([12, 12])["input_ids"]
    cache = torch_paged.PagedCache(model.config)
    expected = decode(stock, DynamicCache(config=model.config), prompts)
    torch.testing.assert_close(decode(wrapper, cache, prompts), expected, atol=1e-4, rtol=1e-4)
    (said,) = messages(caplog)
    assert "LlamaConfig" in said and "past the call of a patched model" in said


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_positions_that_are_not_the_columns(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """RoBERTa's start behind the padding token's id; under a mask those of others count what it hides."""
    model = tiny_causal(name)
    stock, graphs = twin(model), Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    inputs = {} if name == "roberta" else {"attention_mask": batch([12, 7])["attention_mask"]}
    prompts = batch([12, 12])["input_ids"]

    def logits(run: Any, cache: Any) -> Tensor:
        out = []
        mask = inputs.get("attention_mask")
        for first in (0, 12, 13):
            ids = prompts if first == 0 else prompts[:, first - 12 : first - 11]
            seen = None if mask is None else torch.nn.functional.pad(mask, (0, first + ids.shape[1] - 12), value=1)
            with torch.no_grad():
                out.append(run(input_ids=ids, past_key_values=cache, attention_mask=seen).logits[:, -1])
        return torch.stack(out)

    expected = logits(stock, DynamicCache(config=model.config))
    actual = logits(model, torch_paged.PagedCache(model.config))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    (said,) = messages(caplog)
    assert "computes its positions from columns" in said and said.endswith("runs uncompiled") and graphs.runs == 0


def generated_twice(name: str, caplog: pytest.LogCaptureFixture) -> tuple[PreTrainedModel, PreTrainedModel, Graphs]:
    """A model whose steps and second prefill were compiled, with stock's tokens and no warning; stock; its graphs."""
    model = tiny_causal(name)
    stock, graphs = twin(model), Graphs()
    torch_paged.patch(model, compile={"backend": graphs}, block_size=4)
    for _ in range(2):
        assert_same_tokens(stock, generate(stock, RAGGED), generate(model, RAGGED), prompt=RAGGED)
    assert graphs.compiled == 2 and graphs.runs == 2 * 23 + 1 and messages(caplog) == []
    return model, stock, graphs


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_distances_in_columns(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Windows and ALiBi that count columns are those of tokens where the padding stands before them."""
    model, stock, graphs = generated_twice(name, caplog)
    holes = {name: value.clone() for name, value in RAGGED.items()}
    holes["attention_mask"][0, 7] = 0
    assert_same_tokens(stock, generate(stock, holes), generate(model, holes), prompt=holes)
    assert graphs.runs == 2 * 23 + 1 and any("has holes" in said for said in messages(caplog))
    assert_same_tokens(stock, generate(stock, RAGGED), generate(model, RAGGED), prompt=RAGGED)
    assert graphs.compiled == 2 and graphs.runs == 3 * 23 + 2


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_experts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which tokens an expert computes depends on data; the products are one op over all of them."""
    generated_twice(name, caplog)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_what_others_have_stored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """They keep no state, so that rows are packed and passes compiled as in models without such layers."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds}
    shared = shared if name == "gemma4_text" else {}
    model = tiny_causal(name, **shared)
    stock, graphs = twin(model), Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs}, block_size=4, max_prefill_tokens=16)
    assert not torch_paged.PagedCache(model.config).layers[-1].__class__.__name__.startswith("Paged")
    many: dict[str, Any] = dict(eos_token_id=None, max_new_tokens=12)
    computed = 0
    for options, num_tokens in (
        ({}, 34 + 3 * 11),
        ({"num_beams": 3}, 34 + 9 * 11),
        ({"do_sample": True, "num_return_sequences": 2}, 34 + 6 * 11),
    ):
        expected = generate(stock, RAGGED, **many, **options)
        assert_same_tokens(stock, expected, generate(model, RAGGED, **many, **options), prompt=RAGGED)
        assert handle.stats().tokens_computed - computed == num_tokens
        computed += num_tokens
        assert handle.stats().blocks_used == 0
    # Steps, and prefills in pieces.
    assert graphs.compiled == 2 and messages(caplog) == []


def test_control_flow_that_depends_on_data(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    stock, graphs = twin(model), Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs}, block_size=4)
    forward = LlamaMLP.forward

    def branching(self: Any, x: Tensor) -> Tensor:
        return forward(self, x) if x.sum() > 0 else -forward(self, x)

    with mock.patch.object(LlamaMLP, "forward", branching):
        for options in ({}, {"num_beams": 2}, {}):
            expected = generate(stock, RAGGED, **options)
            assert_same_tokens(stock, expected, generate(model, RAGGED, **options), prompt=RAGGED)
            assert handle.stats().blocks_used == 0
    (said,) = messages(caplog)
    assert said.startswith("LlamaForCausalLM: ") and "Data-dependent" in said and said.endswith("runs uncompiled")
    assert graphs.runs == 0


def _hooked(model: PreTrainedModel) -> dict[str, Any]:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    return {}


def _hidden_states(model: PreTrainedModel) -> dict[str, Any]:
    return {"output_hidden_states": True, "return_dict_in_generate": True}


def _dynamic_rope(model: PreTrainedModel) -> dict[str, Any]:
    model.config.rope_parameters["rope_type"] = "dynamic"
    return {}


@pytest.mark.parametrize(
    ("name", "change", "reason", "others"),
    [
        ("llama", _hooked, "forward hooks of its modules", 1),
        ("llama", _hidden_states, "hidden states", 0),
        ("llama", _dynamic_rope, "depend on the longest row", 0),
        ("diffllama", lambda model: {}, "attention does not read the blocks", 1),
    ],
)
def test_calls_that_run_uncompiled(
    name: str, change: Any, reason: str, others: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(name)
    options = change(model)
    stock, graphs = twin(model), Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs})
    for _ in range(2):
        expected, actual = generate(stock, RAGGED, **options), generate(model, RAGGED, **options)
        if options:
            expected, actual = expected.sequences, actual.sequences
        assert_same_tokens(stock, expected, actual, prompt=RAGGED)
    said = [text for text in messages(caplog) if "cannot be compiled" in text]
    assert len(messages(caplog)) == 1 + others
    assert len(said) == 1 and reason in said[0] and said[0].startswith(f"{type(stock).__name__}: ")
    assert graphs.runs == 0
    del actual, expected
    assert handle.stats().blocks_used == 0


def test_gradients(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    stock, graphs = twin(model), Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    cache = torch_paged.PagedCache(model.config)
    for part in (RAGGED["input_ids"][:, :12], RAGGED["input_ids"][:, 12:13]):
        logits = model(input_ids=part, past_key_values=cache).logits
    expected = stock(input_ids=RAGGED["input_ids"][:, :13]).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    (said,) = messages(caplog)
    assert "gradients are on" in said and graphs.runs == 0


def test_embeddings_are_prefilled_uncompiled() -> None:
    model = tiny("llama")
    stock, graphs = twin(model), Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(RAGGED["input_ids"]).detach(),
        "attention_mask": RAGGED["attention_mask"],
    }
    for _ in range(2):
        options = dict(max_new_tokens=6, eos_token_id=None)
        assert torch.equal(generate(model, inputs, **options), generate(stock, inputs, **options))
    assert graphs.runs == 2 * 5


def test_deterministic_requests(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    prompts = [list(range(3, 12)), list(range(5, 9))]
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, deterministic=True)
    results = [result.sequences[0].tolist() for result in torch_paged.generate_many(model, prompts, **options)]
    assert len(results) == 2 and graphs.runs == 0
    (said,) = messages(caplog)
    assert "deterministic=True" in said and said.endswith("runs uncompiled")
