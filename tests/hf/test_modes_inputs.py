"""Whatever generate starts from gives stock's tokens: embeddings, earlier turns, negative prompts, custom loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import torch_paged

from .counting import count_calls, messages, watched
from .models import FAMILIES, NATIVE, assert_same_tokens, batch, generate, tiny

LENGTHS = [30, 1, 17]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings(name: str, with_ids: bool, num_beams: int) -> None:
    model, inputs = tiny(name), batch(LENGTHS)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach() * 1.1
    if with_ids:
        inputs["input_ids"] = ids
    expected = generate(model, inputs, num_beams=num_beams)
    with watched(model, native=name in NATIVE):
        actual = generate(model, inputs, num_beams=num_beams)
    assert expected.shape[1] == 24 + 30 * with_ids
    assert torch.equal(actual, expected)


Turn = tuple[dict[str, torch.Tensor], torch.Tensor]


def _turns(model: PreTrainedModel, second_lengths: list[int], **kwargs: Any) -> list[Turn]:
    """Prompt and tokens of three turns of a chat.

    The second one is ragged, padded on the left, in the middle of what the cache holds.
    """
    ids, mask = batch(LENGTHS).values()
    cache, turns = None, []
    for turn, lengths in enumerate(([], second_lengths, [2, 2, 2])):
        if turn:
            new = batch(lengths, seed=turn)
            ids = torch.cat([ids, new["input_ids"]], 1)
            mask = torch.cat([mask, new["attention_mask"]], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        options = dict(past_key_values=cache, return_dict_in_generate=True, max_new_tokens=6)
        out = generate(model, inputs, **options, **kwargs)
        turns.append((inputs, out.sequences))
        mask = torch.cat([mask, mask.new_ones(len(mask), out.sequences.shape[1] - ids.shape[1])], 1)
        ids, cache = out.sequences, out.past_key_values
    return turns


@pytest.mark.parametrize(
    "kwargs",
    [{"eos_token_id": None}, {"eos_token_id": list(range(150, 211))}, {"do_sample": True}, {"prefill_chunk_size": 4}],
)
@pytest.mark.parametrize("second_lengths", [[5, 5, 5], [7, 2, 1]])
@pytest.mark.parametrize("name", FAMILIES)
def test_turns(name: str, second_lengths: list[int], kwargs: dict[str, Any]) -> None:
    # A rounding must not decide a draw.
    model = tiny(name, torch.float64 if "do_sample" in kwargs else torch.float32)
    expected = _turns(model, second_lengths, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle, count_calls() as calls:
        actual = _turns(model, second_lengths, **kwargs)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    for (prompt, want), (_, got) in zip(expected, actual, strict=True):
        assert_same_tokens(model, want, got, prompt=prompt)
        if not torch.equal(want, got):
            # What follows a near-tie is another chat.
            break
    # A window counts the pads in the middle, which are not stored; a chunk may end in pads.
    ragged = second_lengths[1] < second_lengths[0]
    gathers = ragged and (name == "qwen2-sliding" or "prefill_chunk_size" in kwargs)
    assert (calls["gather"] > 0) == (name not in NATIVE or gathers)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2"])
def test_new_tokens_alone_go_on_from_a_cache(name: str) -> None:
    """As chat templates that give the new turn alone: ids of the turn, mask of the whole."""
    model, first, second = tiny(name), batch([20, 20]), batch([5, 5], seed=3)

    def turns() -> torch.Tensor:
        out = generate(model, first, return_dict_in_generate=True, eos_token_id=None)
        last, cache = out.sequences[:, -1:], out.past_key_values
        ids = torch.cat([last, second["input_ids"]], 1)
        mask = torch.ones(2, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        return generate(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, eos_token_id=None)

    expected = turns()
    with watched(model):
        assert torch.equal(turns(), expected)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_negative_prompts(name: str, num_beams: int) -> None:
    """The guidance makes a cache of its own by a call without one, which is stock's: a call decides, not the model."""
    model, inputs, negative = tiny(name), batch(LENGTHS), batch([9, 4, 2], seed=5)
    rows = {name: tensor.repeat_interleave(num_beams, 0) for name, tensor in negative.items()}
    kwargs = dict(
        negative_prompt_ids=rows["input_ids"], negative_prompt_attention_mask=rows["attention_mask"],
        guidance_scale=1.7, num_beams=num_beams, max_new_tokens=8,
    )  # fmt: skip
    expected = generate(model, inputs, **kwargs)
    caches = []
    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor.__call__

    def recorded(self: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = guide(self, ids, scores)
        caches.append(type(self.unconditional_context["past_key_values"]))
        return scores

    with (
        mock.patch.object(UnbatchedClassifierFreeGuidanceLogitsProcessor, "__call__", recorded),
        watched(model, native=name in NATIVE),
    ):
        actual = generate(model, inputs, **kwargs)
    assert torch.equal(actual, expected)
    assert set(caches) == {DynamicCache}


def _greedy_loop(
    model: Any, input_ids: Any, generation_config: Any, again: int = 0, **model_kwargs: Any
) -> torch.Tensor:
    """A loop as users write it, over stock's helpers."""
    model_kwargs.pop("logits_processor"), model_kwargs.pop("stopping_criteria")
    for _ in range(6 + again):
        inputs = model.prepare_inputs_for_generation(input_ids, **model_kwargs)
        past = model_kwargs["past_key_values"].get_seq_length()
        if past:
            inputs["input_ids"] = input_ids[:, past:]
            inputs["position_ids"] = model_kwargs["position_ids"][:, past:]
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        input_ids = torch.cat([input_ids, outputs.logits[:, -1:].argmax(-1)], 1)
    return input_ids


def _search(model: Any, input_ids: Any, **model_kwargs: Any) -> torch.Tensor:
    """Edits the cache as a tree search does: expand, go two steps, keep the rows in another order, take one back."""
    cache, mask = model_kwargs["past_key_values"], model_kwargs["attention_mask"]
    logits = model(input_ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    cache.batch_repeat_interleave(2)
    tokens = logits.topk(2).indices.flatten()[:, None]
    ids, mask = torch.cat([input_ids.repeat_interleave(2, 0), tokens], 1), mask.repeat_interleave(2, 0)
    for step in range(6):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
        if step == 2:
            keep = logits.max(-1).values.argsort(descending=True)[: len(input_ids)]
            cache.batch_select_indices(keep)
            ids, mask, logits = ids[keep], mask[keep], logits[keep]
        if step == 4:
            cache.crop(-1)
            ids, mask = ids[:, :-1], mask[:, :-1]
        else:
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("kwargs", [{"custom_generate": _greedy_loop}, {"custom_generate": _greedy_loop, "again": 3}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loop_of_ones_own(name: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny(name), batch(LENGTHS)
    expected = generate(model, inputs, **kwargs)
    with watched(model, native=name in NATIVE):
        assert torch.equal(generate(model, inputs, **kwargs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "diffllama"])
def test_a_loop_that_edits_the_cache(name: str) -> None:
    """Without a sliding window: stock's window does not go back."""
    model, inputs = tiny(name), batch(LENGTHS)
    expected = generate(model, inputs, custom_generate=_search)
    with watched(model, native=name in NATIVE):
        assert torch.equal(generate(model, inputs, custom_generate=_search), expected)


def test_a_recipe_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(
        "def generate(model, **kwargs):\n"
        "    given = {name: value for name, value in kwargs.items() if value is not None}\n"
        "    return model.generate(**given, num_beams=3)\n"
    )
    model, inputs = tiny("llama"), batch(LENGTHS)
    kwargs = dict(custom_generate=str(tmp_path), trust_remote_code=True)
    expected = generate(model, inputs, **kwargs)
    with watched(model):
        assert torch.equal(generate(model, inputs, **kwargs), expected)


def test_continuous_batching_stays_stocks(caplog: pytest.LogCaptureFixture) -> None:
    """`generate_batch` has a paged cache of its own; afterwards, generate reads our blocks again."""
    model, prompts = tiny("llama"), [[5, 6, 7], [9, 10]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def tokens() -> list[list[int]]:
        answers = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        return [answers[f"req_{row}"].generated_tokens for row in range(len(prompts))]

    expected = tokens()
    with torch_paged.paged(model) as handle:
        assert tokens() == expected
        assert handle.stats().peak_bytes == 0
        with watched(model):
            generate(model, batch([9]))
    assert messages(caplog) == []


def test_a_window_of_one_keeps_stocks_cache(caplog: pytest.LogCaptureFixture) -> None:
    """Stock's layer keeps every token then, and its tokens see them all."""
    model, inputs = tiny("window-of-one"), batch([9, 4])
    expected = generate(model, inputs)
    with torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(generate(model, inputs, past_key_values=torch_paged.PagedCache(model.config)), expected)
        assert handle.stats().peak_bytes == 0
    assert torch.equal(generate(model, inputs, past_key_values=torch_paged.PagedCache(model.config)), expected)
    (message,) = messages(caplog)
    assert "sliding window of 1" in message and "nothing is paged" in message
