"""generate on a GPU: no tensor is left on the CPU, and the tokens are stock's.

On a machine without one, on tensors that say they are on a GPU and fail where they meet one of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

import torch_paged
from tests.pretend_gpu import pretend_gpu
from torch_paged import GenerationRequest, PagedCache
from torch_paged.memory import Pool

from .counting import count_calls
from .many import BLOCK, BLOCK_BYTES, OPTIONS, admitting_all, prompts, run
from .models import assert_same_tokens, batch, generate, tiny, tiny_t5, twin
from .swaps import count_swapped

LENGTHS = [20, 5, 11]
TWO_GPUS = {
    "model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.layers.0": "cuda:0",
    "model.layers.1": "cuda:1", "model.layers.2": "cuda:1", "model.norm": "cuda:1", "lm_head": "cuda:1",
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"num_beams": 3},
    "samples of a prompt": {"do_sample": True, "num_return_sequences": 2},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "early ends": {"eos_token_id": list(range(150, 211))},
}


@pytest.fixture(params=["pretend", pytest.param("hardware", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "hardware":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield "hardware"
        return
    with pretended(monkeypatch):
        yield "pretend"


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended GPU that has our kernels."""
    for module in ("layer", "support"):
        monkeypatch.setattr(f"torch_paged.hf.{module}.has_kernel", lambda op, device_type: True)
    with pretend_gpu(monkeypatch):
        yield


def there(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model, and another with the same weights, on the CPU yet."""
    # A pretended GPU has no kernels for SDPA, nor those that count integers for grouped experts.
    made = tiny(name, attn_implementation=None if name == "bloom" else "eager")
    if name in ("gpt_oss", "jamba"):
        made.set_experts_implementation("eager")
    return made, twin(made)


def both(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    stock, model = pair(name)
    return stock.to("cuda"), model.to("cuda")


def tokens_of(result: Any) -> torch.Tensor:
    sequences = getattr(result, "sequences", result)
    assert sequences.device.type == "cuda"
    return sequences


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode(gpu: str, mode: dict[str, Any]) -> None:
    stock, model = both("llama")
    inputs = there(batch(LENGTHS))
    expected = tokens_of(generate(stock, inputs, **mode))
    with torch_paged.paged(model, block_size=4, strict=True, max_memory="4MiB") as handle, count_calls() as calls:
        actual = tokens_of(generate(model, inputs, **mode))
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    assert calls["paged.attention"] > 0 == calls["gather"]
    if mode.get("do_sample") and gpu == "hardware":
        # A draw that rounding decides is another draw.
        assert actual.shape[0] == expected.shape[0]
    else:
        assert_same_tokens(stock, expected, actual, inputs)


@pytest.mark.parametrize(
    "name", ["qwen2-sliding", "mistral", "gpt2", "opt", "bloom", "gemma2", "gpt_oss", "phi", "jamba", "diffllama"]
)
def test_every_family(gpu: str, name: str) -> None:
    stock, model = both(name)
    inputs = there(batch(LENGTHS))
    with torch_paged.paged(model, block_size=4, max_memory="4MiB") as handle:
        for mode in ({}, {"num_beams": 2}):
            mode = mode | {"max_new_tokens": 12}
            expected = tokens_of(generate(stock, inputs, **mode))
            assert_same_tokens(stock, expected, tokens_of(generate(model, inputs, **mode)), inputs)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes


def test_assistants(gpu: str) -> None:
    stock, model = both("llama")
    _, assistant = both("llama")
    inputs = there(batch([20]))
    expected = tokens_of(generate(stock, inputs))
    with torch_paged.paged(model, block_size=4), torch_paged.paged(assistant, block_size=4):
        for option in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            assert_same_tokens(stock, expected, tokens_of(generate(model, inputs, **option)), inputs)


def test_a_cache_that_is_kept(gpu: str) -> None:
    """Passed on between turns, by an unpatched model too, which gathers; reordered, cropped, read."""
    stock, model = both("llama")
    inputs = there(batch([12, 12]))
    expected = tokens_of(generate(stock, inputs, eos_token_id=None))
    for knows in (True, False):
        handle = torch_paged.patch(model, block_size=4) if knows else None
        cache = PagedCache(model.config, block_size=4, max_memory="4MiB")
        first = generate(model, inputs, past_key_values=cache, max_new_tokens=8, eos_token_id=None)
        again = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        actual = generate(model, again, past_key_values=cache, max_new_tokens=16, eos_token_id=None)
        assert_same_tokens(stock, expected, tokens_of(actual), inputs)
        cache.crop(10 - cache.get_seq_length())
        cache.batch_select_indices(torch.tensor([1, 0], device="cuda"))
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        keys = cache.layers[0].keys
        assert keys.device.type == "cuda" and keys.shape[:3] == (2, 2, 10)
        if handle is not None:
            handle.unpatch()


def test_remembered_prefixes(gpu: str) -> None:
    stock, model = both("llama")
    inputs = there(batch([21, 13]))
    with torch_paged.paged(model, block_size=4, prefix_caching=True, max_memory="4MiB") as handle:
        for _ in range(2):
            expected = tokens_of(generate(stock, inputs))
            assert_same_tokens(stock, expected, tokens_of(generate(model, inputs)), inputs)
        assert handle.stats().blocks_cached > 0


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_rows_that_wait_for_blocks(gpu: str, how: str) -> None:
    stock, model = both("llama")
    inputs = there(batch([21, 9, 17, 30, 5, 12]))
    expected = tokens_of(generate(stock, inputs, max_new_tokens=20))
    knobs = {"block_size": BLOCK, "max_memory": 15 * BLOCK_BYTES, "on_pressure": how}
    with torch_paged.paged(model, **knobs) as handle, count_swapped() as blocks:
        assert_same_tokens(stock, expected, tokens_of(generate(model, inputs, max_new_tokens=20)), inputs)
        assert handle.stats().blocks_used == 0
    assert (blocks["out"] > 0) == (how == "swap") and blocks["in"] == blocks["out"]


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_many_requests(gpu: str, how: str) -> None:
    """With options of their own, in as little memory as makes them give way to one another."""
    stock, model = both("llama")
    asked = [prompt.to("cuda") for prompt in prompts([9, 5, 17, 12, 3])]
    own: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}, {"prompt_lookup_num_tokens": 3}, {}, {}]
    options = OPTIONS | {"eos_token_id": None}
    knobs = {"block_size": BLOCK, "max_memory": 18 * BLOCK_BYTES, "on_pressure": how}
    with torch_paged.paged(model, **knobs) as handle, admitting_all():
        requests = [GenerationRequest(prompt, options=o) for prompt, o in zip(asked, own, strict=True)]
        answers, stats = run(model, requests, **options)
        assert handle.stats().blocks_used == 0 < stats.preemptions
    for number, (prompt, each) in enumerate(zip(asked, own, strict=True)):
        inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
        expected = tokens_of(stock.generate(**inputs, **(options | each)))
        assert_same_tokens(stock, expected, tokens_of(answers[number]), inputs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_decode_steps() -> None:
    stock, model = both("llama")
    for lengths in (LENGTHS, [17]):
        inputs = there(batch(lengths))
        expected = tokens_of(generate(stock, inputs))
        with torch_paged.paged(model, block_size=4, compile=True):
            assert_same_tokens(stock, expected, tokens_of(generate(model, inputs)), inputs)


def test_encoder_and_decoder(gpu: str) -> None:
    made = tiny_t5()
    stock, model = twin(made).to("cuda"), made.to("cuda")
    inputs = there(batch([9, 5]))
    with torch_paged.paged(model, block_size=4) as handle:
        assert torch.equal(tokens_of(generate(model, inputs)), tokens_of(generate(stock, inputs)))
        assert handle.stats().peak_bytes > 0


def test_blocks_go_to_pinned_memory(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []
    empty = torch.empty

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        pinned.append(kwargs.get("pin_memory", False))
        return empty(*args, **kwargs)

    stock, model = both("llama")
    with torch_paged.paged(model, block_size=BLOCK, max_memory=15 * BLOCK_BYTES, on_pressure="swap"):
        save = Pool.save_blocks

        def saved(pool: Pool, blocks: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", noted)
                return save(pool, blocks)

        monkeypatch.setattr(Pool, "save_blocks", saved)
        generate(model, there(batch([21, 9, 17, 30, 5, 12])), max_new_tokens=20)
    assert pinned and all(pinned)


def test_layers_on_two_gpus(gpu: str) -> None:
    if gpu == "hardware" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    stock, model = (dispatch_model(each, TWO_GPUS) for each in pair("llama"))
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    inputs = there(batch(LENGTHS))
    with torch_paged.paged(model, block_size=4, strict=True, max_memory="4MiB") as handle, count_calls() as calls:
        for mode in ({}, {"num_beams": 2}):
            expected = tokens_of(generate(stock, inputs, **mode))
            assert_same_tokens(stock, expected, tokens_of(generate(model, inputs, **mode)), inputs)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    assert calls["paged.attention"] > 0 == calls["gather"]
