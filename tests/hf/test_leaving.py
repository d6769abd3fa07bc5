"""Finished rows leave: they are not computed and hold no blocks, and nobody who looks on sees a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

import torch_paged

from .causal_types import WINDOW, tiny_causal
from .counting import count_tokens
from .model_type_table import read
from .models import EOS, FAMILIES, assert_same_tokens, batch, generate, tiny
from .test_threads import in_threads

LENGTHS = [17, 4, 30]
WISHES = [3, 12, 7]
# Layers of another kind read along the row, or positions are counted in columns.
NOT_PACKED = set(
    """
    bamba bart blenderbot blenderbot-small granitemoehybrid jamba lfm2_moe lfm3 marian mbart
    moss_transcribe_diarize nemotron_h olmo_hybrid pegasus plbart qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_next recurrent_gemma whisper
    """.split()  # noqa: SIM905  a list literal would take 20 lines
)


class Wishes(StoppingCriteria):
    """Ends each row after its own number of new tokens; with an `eos_token_id`, so that stock pads the row then."""

    def __init__(self, width: int, wishes: list[int], eos: bool = True) -> None:
        self.width, self.wishes = width, torch.tensor(wishes)
        if eos:
            self.eos_token_id = torch.tensor([EOS])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] - self.width >= self.wishes


class Watcher(LogitsProcessor):
    """Notes what a processor sees, and what blocks are in use."""

    def __init__(self, handle: Any = None) -> None:
        self.ids: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        self.blocks: list[int] = []
        self.handle = handle

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids.clone())
        self.shapes.append(tuple(scores.shape))
        if self.handle is not None:
            self.blocks.append(self.handle.stats().blocks_used)
        return scores


def run(model: PreTrainedModel, watcher: Watcher, eos: bool = True, **kwargs: Any) -> Any:
    criteria = [Wishes(max(LENGTHS), WISHES, eos)]
    options: dict[str, Any] = dict(max_new_tokens=14, eos_token_id=None, logits_processor=[watcher])
    return generate(model, batch(LENGTHS), stopping_criteria=criteria, **(options | kwargs))


@pytest.mark.parametrize(
    "kwargs", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}]
)
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2", "bloom"])
def test_each_token_that_is_needed_is_computed_and_no_other(name: str, kwargs: dict[str, Any]) -> None:
    model, seen, ours = tiny(name), Watcher(), Watcher()
    expected = run(model, seen, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle, count_tokens(model) as tokens:
        actual = run(model, ours, **kwargs)
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=batch(LENGTHS))
    # The first new token comes from the prompt. A row that is to have n new tokens is computed for n - 1 of them.
    assert tokens == [sum(LENGTHS)] + [sum(wish - 1 > step for wish in WISHES) for step in range(max(WISHES) - 1)]
    assert ours.shapes == seen.shapes
    assert all(torch.equal(a, b) for a, b in zip(ours.ids, seen.ids, strict=True))


def test_blocks_are_free_in_the_step_after_the_row_finished() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, block_size=1) as handle:
        watcher = Watcher(handle)
        run(model, watcher)
    expected = [
        sum(length + step for length, wish in zip(LENGTHS, WISHES, strict=True) if step == 0 or wish > step)
        for step in range(max(WISHES))
    ]
    assert watcher.blocks == expected


def test_without_an_eos_criterion_rows_go_on_as_stocks_do() -> None:
    model = tiny("llama")
    expected = run(model, Watcher(), eos=False)
    with torch_paged.paged(model), count_tokens(model) as tokens:
        actual = run(model, Watcher(), eos=False)
    assert_same_tokens(model, expected, actual, prompt=batch(LENGTHS))
    assert tokens[1:] == [3] * (max(WISHES) - 1)


@pytest.mark.parametrize("asked", ["output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate"])
def test_rows_stay_where_the_caller_gets_more_than_tokens(asked: str) -> None:
    model, kwargs = tiny("llama"), {"return_dict_in_generate": True, asked: True}
    expected = run(model, Watcher(), **kwargs)
    with torch_paged.paged(model, block_size=1) as handle, count_tokens(model) as tokens:
        actual = run(model, Watcher(), **kwargs)
        assert handle.stats().blocks_used == sum(LENGTHS) + 3 * (max(WISHES) - 1)
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        if expected.get(name) is not None:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)
    assert tokens[1:] == [3] * (max(WISHES) - 1)


def test_the_knob_keeps_all_rows() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, drop_finished_rows=False), count_tokens(model) as tokens:
        run(model, Watcher())
    assert tokens[1:] == [3] * (max(WISHES) - 1)


def test_rows_stay_in_a_cache_of_the_callers() -> None:
    model = tiny("llama")
    with torch_paged.paged(model), count_tokens(model) as tokens:
        run(model, Watcher(), past_key_values=torch_paged.PagedCache(model.config))
    assert tokens[1:] == [3] * (max(WISHES) - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_block_is_lost_when_a_processor_raises_after_rows_left(name: str) -> None:
    class Fails(Watcher):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if len(self.shapes) == 6:
                raise KeyError("mid-run")
            return super().__call__(input_ids, scores)

    model = tiny(name)
    with torch_paged.paged(model) as handle:
        with pytest.raises(KeyError, match="mid-run") as raised:
            run(model, Fails())
        assert handle.stats().blocks_used == 0
        del raised
        assert torch.equal(run(model, Watcher()), run(model, Watcher()))


def test_beams_leave_together_when_their_prompt_is_done() -> None:
    """The prompts end at different steps; which beams win does not change."""
    model, lengths = tiny("llama"), [17, 4, 30]
    inputs = batch(lengths)
    kwargs: dict[str, Any] = dict(num_beams=3, max_new_tokens=40, early_stopping=True, num_return_sequences=2)
    kwargs["eos_token_id"] = list(range(180, 211))
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle, count_tokens(model) as tokens:
        actual = generate(model, inputs, **kwargs)
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    steps = tokens[1:]
    assert steps[0] == 9 and set(steps) <= {9, 6, 3} and len(set(steps)) > 1
    assert steps == sorted(steps, reverse=True)


def test_beams_stay_where_a_processor_of_the_callers_own_watches() -> None:
    model, inputs = tiny("llama"), batch(LENGTHS)
    kwargs: dict[str, Any] = dict(num_beams=3, max_new_tokens=40, early_stopping=True)
    kwargs["eos_token_id"] = list(range(180, 211))
    seen, ours = Watcher(), Watcher()
    generate(model, inputs, logits_processor=[seen], **kwargs)
    with torch_paged.paged(model), count_tokens(model) as tokens:
        generate(model, inputs, logits_processor=[ours], **kwargs)
    assert set(tokens[1:]) == {9}
    assert all(torch.equal(a, b) for a, b in zip(ours.ids, seen.ids, strict=True))


@pytest.mark.parametrize("model_type", sorted(name for name, row in read().items() if row.path == "native"))
def test_finished_rows_leave_every_native_type(model_type: str) -> None:
    """With stock's tokens, left padding and prompts that are alike. What is packed computes no token twice."""
    model = tiny_causal(model_type)
    inputs = batch([WINDOW + 6, 5, 12])
    inputs = {name: torch.cat([value, value[1:2]]) for name, value in inputs.items()}

    def run_it() -> Tensor:
        criteria = [Wishes(WINDOW + 6, [3, 6, 2, 4])]
        return generate(model, inputs, stopping_criteria=criteria, max_new_tokens=6, eos_token_id=None)

    expected = run_it()
    with torch_paged.paged(model, block_size=4, max_memory="64MiB", max_prefill_tokens=16) as handle:
        with count_tokens(model) as tokens:
            actual = run_it()
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    if model_type in NOT_PACKED:
        assert tokens[1:] == [4] * 5
    else:
        assert sum(tokens) == WINDOW + 6 + 5 + 12 + (2 + 5 + 1 + 3)


def test_answers_of_rows_that_left_are_remembered() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, block_size=4, prefix_caching=True):
        answers = run(model, Watcher())
        # The row that ended first: 17 tokens of its prompt and 3 new ones, the last of which was not stored.
        whole = answers[0, max(LENGTHS) - LENGTHS[0] : max(LENGTHS) + WISHES[0]][None]
        with count_tokens(model) as tokens:
            generate(model, {"input_ids": torch.cat([whole, whole[:, :2]], 1)}, max_new_tokens=1)
    assert tokens == [22 - (17 + 3 - 1) // 4 * 4]


def test_rows_leave_a_model_that_is_spread_over_cpu_and_disk(tmp_path: Path) -> None:
    model = tiny("qwen2-sliding")
    expected = run(model, Watcher())
    model = disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch_paged.paged(model, block_size=4, max_prefill_tokens=16) as handle, count_tokens(model) as tokens:
        actual = run(model, Watcher())
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=batch(LENGTHS))
    assert tokens == [16, 16, 16, 3] + [sum(wish - 1 > step for wish in WISHES) for step in range(max(WISHES) - 1)]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_rows_leave_in_two_threads_at_once(name: str) -> None:
    model = tiny(name)
    expected = run(model, Watcher())
    with torch_paged.paged(model, block_size=4, max_prefill_tokens=16) as handle:
        jobs = [
            lambda: run(model, Watcher()),
            lambda: run(model, Watcher(), num_beams=2),
            lambda: run(model, Watcher()),
        ]
        first, _, second = in_threads(jobs)
        assert handle.stats().blocks_used == 0
    assert torch.equal(first, expected) and torch.equal(second, expected)
