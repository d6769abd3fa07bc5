"""All that generate gives besides tokens is stock's: scores, logits, states, weights, streams, what callbacks see."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import torch_paged

from .counting import watched
from .models import FAMILIES, NATIVE, WINDOW, batch, generate, tiny, tiny_tokenizer

LENGTHS = [40, 1, 23]
EVERYTHING = dict(
    return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True, max_new_tokens=6
)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 9},
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_logits_and_hidden_states(name: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny(name, torch.float64), batch(LENGTHS)
    expected = dict(generate(model, inputs, **EVERYTHING, **kwargs))
    with watched(model, native=name in NATIVE):
        actual = dict(generate(model, inputs, **EVERYTHING, **kwargs))
        assert actual.pop("past_key_values").get_seq_length() == expected.pop("past_key_values").get_seq_length()
    assert actual.keys() == expected.keys()
    hidden, paged_hidden = expected.pop("hidden_states"), actual.pop("hidden_states")
    for kind, value in actual.items():
        torch.testing.assert_close(value, expected[kind])
    rows = paged_hidden[0][0].shape[0] // len(LENGTHS)
    # What no token reads need not be the same: the states of pads.
    real = inputs["attention_mask"].bool().repeat_interleave(rows, 0)[:, -hidden[0][0].shape[1] :]
    for step, (layers, paged_layers) in enumerate(zip(hidden, paged_hidden, strict=True)):
        for layer, paged_layer in zip(layers, paged_layers, strict=True):
            assert layer.shape == paged_layer.shape
            seen = real if step == 0 else ...
            torch.testing.assert_close(paged_layer[seen], layer[seen])


def test_transition_scores() -> None:
    model, inputs = tiny("llama"), batch(LENGTHS)

    def scores() -> torch.Tensor:
        out = generate(model, inputs, num_beams=3, output_scores=True, return_dict_in_generate=True)
        return model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=True)

    expected = scores()
    with watched(model):
        torch.testing.assert_close(scores(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"prefill_chunk_size": 9}])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral"])
def test_attention_weights_have_stocks_columns(name: str, kwargs: dict[str, Any]) -> None:
    """A sliding layer shows its window and no more. A prompt that is not padded, past the window."""
    model, inputs = tiny(name, attn_implementation="eager"), batch([30, 30])
    kwargs = dict(output_attentions=True, return_dict_in_generate=True, max_new_tokens=6) | kwargs
    expected = generate(model, inputs, **kwargs)
    with watched(model, native=False):
        actual = dict(generate(model, inputs, **kwargs))
        del actual["past_key_values"]
    assert torch.equal(actual["sequences"], expected.sequences)
    for want, got in zip(expected.attentions, actual["attentions"], strict=True):
        torch.testing.assert_close(got, want)
    assert name == "llama" or expected.attentions[-1][-1].shape[-1] == WINDOW


def test_a_returned_cache_shows_stocks_keys_and_values() -> None:
    model, inputs = tiny("qwen2-sliding"), batch([30, 30])
    expected = generate(model, inputs, return_dict_in_generate=True).past_key_values
    with torch_paged.paged(model) as handle:
        actual = generate(model, inputs, return_dict_in_generate=True).past_key_values
        for want, got in zip(expected.layers, actual.layers, strict=True):
            assert want.get_max_length() == got.get_max_length()
            torch.testing.assert_close((got.keys, got.values), (want.keys, want.values), rtol=1e-4, atol=1e-4)
        assert handle.stats().blocks_used > 0
        del got, actual
        assert handle.stats().blocks_used == 0


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("kwargs", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_tokens(name: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny(name), batch([20] if "prompt_lookup_num_tokens" in kwargs else [20, 7])
    stock, paged = Recorder(), Recorder()
    generate(model, inputs, streamer=stock, **kwargs)
    with watched(model, native=name in NATIVE):
        generate(model, inputs, streamer=paged, **kwargs)
    assert paged.seen == stock.seen and paged.seen[-1] == "end"


def test_streamed_text(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs, tokenizer = tiny("llama"), batch([9]), tiny_tokenizer()
    generate(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = capsys.readouterr().out
    with watched(model):
        generate(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected != ""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)

    def run() -> None:
        with watched(model):
            generate(model, inputs, streamer=streamer)

    thread = threading.Thread(target=run)
    thread.start()
    assert "".join(streamer) + "\n" == expected
    thread.join()


class Forbid(LogitsProcessor):
    """Forbids the tokens that stand in a row's last five, and keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores.scatter(1, input_ids[:, -5:], -torch.inf)


class StopAt(StoppingCriteria):
    """Stops a row at an even token, and all rows after ten steps."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = input_ids[:, -1] % 2 == 0
        return done | torch.full_like(done, input_ids.shape[1] >= 50)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_processors_and_criteria_of_ones_own(name: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny(name, torch.float64), batch(LENGTHS)

    def run() -> list[torch.Tensor]:
        forbid = Forbid()
        hooks = dict(logits_processor=LogitsProcessorList([forbid]), stopping_criteria=StoppingCriteriaList([StopAt()]))
        return [generate(model, inputs, **hooks, **kwargs), *forbid.seen]

    expected = run()
    with watched(model, native=name in NATIVE):
        actual = run()
    assert [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_allowed_tokens(name: str, num_beams: int) -> None:
    model, inputs = tiny(name), batch(LENGTHS)

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [token for token in range(3, 200) if (token + row + int(ids[-1])) % 3 == 0]

    expected = generate(model, inputs, prefix_allowed_tokens_fn=allowed, num_beams=num_beams, max_new_tokens=8)
    with watched(model, native=name in NATIVE):
        actual = generate(model, inputs, prefix_allowed_tokens_fn=allowed, num_beams=num_beams, max_new_tokens=8)
    assert torch.equal(actual, expected)
