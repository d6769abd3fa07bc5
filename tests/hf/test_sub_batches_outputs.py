"""Outputs of sub-batches are joined as those of one batch: scores, logits, attentions, hidden states, beams."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from .counting import messages
from .models import batch, tiny
from .test_pressure import LENGTHS, NEW
from .test_sub_batches import DICT, ENDS, hooked, pressed


def assert_close(expected: Any, actual: Any) -> None:
    """Tensors at every place of the same tuples."""
    if isinstance(expected, tuple):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_close(one, other)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "top_k": 1}], ids=["greedy", "draws"])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2", "diffllama", "jamba"])
def test_scores_and_logits_of_all_rows(name: str, kwargs: dict[str, Any]) -> None:
    stock, inputs = tiny(name), batch(LENGTHS)
    expected, actual, attempts = pressed(
        stock, inputs, lambda: DICT | dict(max_new_tokens=NEW, eos_token_id=None) | kwargs
    )
    assert attempts > 2
    assert torch.equal(expected.sequences, actual.sequences)
    assert type(actual) is type(expected) and actual.past_key_values is None
    assert_close(expected.scores, actual.scores)
    assert_close(expected.logits, actual.logits)


def test_steps_after_the_end_of_a_sub_batch_are_zeros() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS, seed=3)
    options = DICT | dict(max_new_tokens=NEW, eos_token_id=ENDS)
    expected, actual, _ = pressed(stock, inputs, lambda: options)
    assert torch.equal(expected.sequences, actual.sequences)
    zeros = 0
    for step, (one, other) in enumerate(zip(expected.logits, actual.logits, strict=True)):
        for row in range(len(LENGTHS)):
            tokens = expected.sequences[row, max(LENGTHS) : max(LENGTHS) + step]
            if not other[row].any():
                zeros += 1
                assert torch.isin(tokens, torch.tensor(ENDS)).any()
            else:
                torch.testing.assert_close(other[row], one[row], rtol=1e-4, atol=1e-4)
    assert zeros > 0


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_hidden_states_and_attentions_of_all_rows(what: str) -> None:
    stock, inputs = tiny("llama", attn_implementation="eager"), batch([12] * 5)
    options = {"return_dict_in_generate": True, what: True, "max_new_tokens": NEW, "eos_token_id": None}
    expected, actual, attempts = pressed(stock, inputs, lambda: options)
    assert attempts > 1
    assert torch.equal(expected.sequences, actual.sequences)
    field = what.removeprefix("output_")
    assert_close(expected[field], actual[field])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_return_sequences": 2},
        {"eos_token_id": ENDS, "early_stopping": True},
        {"eos_token_id": ENDS, "length_penalty": -1.0},
    ],
    ids=["", "several", "early", "short"],
)
def test_beams_with_their_scores_and_indices(kwargs: dict[str, Any]) -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    options = DICT | dict(num_beams=3, max_new_tokens=12, eos_token_id=None) | kwargs
    expected, actual, attempts = pressed(stock, inputs, lambda: options)
    assert attempts > 1
    assert torch.equal(expected.sequences, actual.sequences)
    assert torch.equal(expected.beam_indices, actual.beam_indices)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores)
    assert [each.shape for each in actual.scores] == [each.shape for each in expected.scores]
    scores = [
        stock.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
        for result in (expected, actual)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_the_user_hears_of_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_paged"):
        pressed(hooked(), batch(LENGTHS), lambda: DICT | dict(max_new_tokens=NEW, eos_token_id=None))
    said = "\n".join(messages(caplog))
    assert "past_key_values is None" in said and "hooks see fewer rows" in said
