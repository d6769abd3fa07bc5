"""Prompts are prefilled without padding, each token once, in passes of bounded size: exact counts of tokens."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.hf.passes import Sharing, plan_passes

from .causal_types import tiny_causal
from .counting import count_calls, count_tokens
from .models import PAD, assert_same_tokens, batch, generate, tiny

NAMES = ["llama", "qwen2-sliding", "mistral", "gpt2", "bloom"]
NEW: dict[str, Any] = dict(max_new_tokens=5, eos_token_id=None)


def rows_of(prompts: list[Tensor]) -> dict[str, Tensor]:
    """A left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0), value=PAD) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def prompt(length: int, seed: int) -> Tensor:
    return batch([length], seed=seed)["input_ids"][0]


@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_run_in_passes_of_bounded_size(name: str) -> None:
    model, inputs = tiny(name), batch([50, 7, 33])
    expected = generate(model, inputs, **NEW)
    with torch_paged.paged(model, block_size=4, max_prefill_tokens=16), count_tokens(model) as tokens:
        actual = generate(model, inputs, **NEW)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert tokens == [16] * 5 + [10] + [3] * 4


@pytest.mark.parametrize("name", NAMES)
def test_all_logits_and_hidden_states_of_passes_are_stocks_and_zero_at_pads(name: str) -> None:
    model = tiny(name)
    shared = prompt(12, 1)
    inputs = rows_of([torch.cat([shared, prompt(9, 2)]), prompt(5, 3), torch.cat([shared, prompt(3, 4)])])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    arguments: dict[str, Any] = inputs | {"output_hidden_states": True}
    if name != "bloom":
        arguments["position_ids"] = positions
    with torch.no_grad():
        expected = model(**arguments)
        cache = torch_paged.PagedCache(model.config, block_size=4, min_shared_prefix=8, max_prefill_tokens=10)
        with torch_paged.paged(model), count_tokens(model) as tokens:
            actual = model(**arguments, past_key_values=cache)
    assert sum(tokens) == 12 + 9 + 5 + 3
    assert max(tokens) <= 10
    real = inputs["attention_mask"].bool()[:, :, None]
    torch.testing.assert_close(actual.logits, expected.logits * real, rtol=1e-4, atol=1e-4)
    for got, want in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(got, want * real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_prefill_tokens", [2048, 7])
def test_equal_rows_anywhere_are_computed_once(name: str, max_prefill_tokens: int) -> None:
    model, first, second = tiny(name), prompt(21, 1), prompt(9, 2)
    inputs = rows_of([first, second, first, first, second])
    expected = generate(model, inputs, do_sample=True, **NEW)
    knobs = dict(block_size=4, max_prefill_tokens=max_prefill_tokens)
    with torch_paged.paged(model, **knobs) as handle, count_tokens(model) as tokens:
        actual = generate(model, inputs, do_sample=True, **NEW)
        assert handle.stats().tokens_computed == sum(tokens)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert sum(tokens[:-4]) == 21 + 9
    assert tokens[-4:] == [5] * 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_prefill_tokens", [2048, 11])
def test_long_common_prefixes_are_computed_and_stored_once(name: str, max_prefill_tokens: int) -> None:
    """A tree of prompts: two that begin alike go on alike for a while, and one is a prefix of another."""
    model, knobs = tiny(name), dict(block_size=4, min_shared_prefix=8, max_prefill_tokens=max_prefill_tokens)
    root, branch = prompt(18, 1), prompt(10, 2)
    tails = [prompt(5, 3), prompt(7, 4), prompt(3, 5)]
    prompts = [
        torch.cat([root, branch, tails[0]]), prompt(6, 6), torch.cat([root, branch, tails[1]]), root,
        torch.cat([root, tails[2]]), torch.cat([root, branch, tails[0]]),
    ]  # fmt: skip
    inputs = rows_of(prompts)
    expected = generate(model, inputs, **NEW)
    with torch_paged.paged(model, **knobs) as handle, count_tokens(model) as tokens:
        actual = generate(model, inputs, **NEW)
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert sum(tokens[:-4]) == 18 + 10 + 5 + 6 + 7 + 3
    assert tokens[-4:] == [6] * 4


def test_common_prefixes_share_their_full_blocks() -> None:
    model, root = tiny("llama"), prompt(18, 1)
    inputs = rows_of([torch.cat([root, prompt(3, seed)]) for seed in (2, 3, 4)])
    with torch_paged.paged(model, block_size=4, min_shared_prefix=8) as handle:
        out = generate(model, inputs, max_new_tokens=1, eos_token_id=None, return_dict_in_generate=True)
        # 18 tokens are 4 full blocks; 2 more and 3 of each row's own lie in two blocks of its own.
        assert handle.stats().blocks_shared == 4
        assert handle.stats().blocks_used == 4 + 3 * 2
        del out


def test_short_prefixes_are_not_worth_a_pass() -> None:
    model, root = tiny("llama"), prompt(18, 1)
    inputs = rows_of([torch.cat([root, prompt(3, 2)]), torch.cat([root, prompt(3, 3)])])
    for at_least, expected in ((19, [42]), (0, [42]), (18, [18, 6])):
        with torch_paged.paged(model, min_shared_prefix=at_least), count_tokens(model) as tokens:
            generate(model, inputs, max_new_tokens=1)
        assert tokens == expected


def test_embeddings_are_told_apart_too() -> None:
    model, first, second = tiny("llama"), prompt(12, 1), prompt(12, 2)
    embedded = model.get_input_embeddings()(torch.stack([first, second, first]))
    inputs = {"inputs_embeds": embedded, "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    expected = generate(model, inputs, max_new_tokens=4, eos_token_id=None)
    computed: list[int] = []
    layer = model.model.layers[0]
    forward = layer.forward

    def counted(states: Tensor, **kwargs: Any) -> Any:
        computed.append(states.shape[1])
        return forward(states, **kwargs)

    with torch_paged.paged(model), mock.patch.object(layer, "forward", counted):
        actual = generate(model, inputs, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(actual, expected)
    assert computed[:1] == [24]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_a_pass_that_fails_takes_back_those_before_it(name: str) -> None:
    """A second turn over a cache of the caller's, in passes, the third of which raises."""
    model, first, second = tiny(name), batch([20, 9]), batch([24, 24], seed=1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 24, dtype=torch.long)], 1)
    turn: dict[str, Any] = dict(input_ids=second["input_ids"], attention_mask=mask)
    turn["position_ids"] = (mask.cumsum(1) - 1)[:, 20:]
    first = first | {"position_ids": (first["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    embedding = model.get_input_embeddings()
    embed = embedding.forward

    def fail(ids: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third pass")
        return embed(ids)

    knobs: dict[str, Any] = dict(block_size=4, max_prefill_tokens=10)
    with torch.no_grad(), torch_paged.paged(model, **knobs):
        cache = torch_paged.PagedCache(model.config, **knobs)
        model(**first, past_key_values=cache)
        used, lengths = cache.stats().blocks_used, cache.state.seq_lens.tolist()
        calls: list[int] = []
        with pytest.raises(KeyError, match="third pass"), mock.patch.object(embedding, "forward", fail):
            model(**turn, past_key_values=cache)
        # The first turn, and two passes of the second: the third does not count.
        assert cache.stats().tokens_computed == 29 + 2 * 10
        assert (cache.state.seq_lens.tolist(), cache.get_seq_length()) == (lengths, 20)
        # What no later token sees through the window may be gone.
        assert cache.stats().blocks_used == used if name == "llama" else cache.stats().blocks_used <= used
        again = model(**turn, past_key_values=cache).logits
        fresh = torch_paged.PagedCache(model.config)
        model(**first, past_key_values=fresh)
        torch.testing.assert_close(again, model(**turn, past_key_values=fresh).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_of_the_longest_row_keep_the_batch_whole(rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    model = tiny_causal("llama", rope_parameters=parameters, max_position_embeddings=24)
    inputs = batch([30, 9])
    expected = generate(model, inputs, **NEW)
    with torch_paged.paged(model, max_prefill_tokens=8), count_tokens(model) as tokens:
        actual = generate(model, inputs, **NEW)
    assert torch.equal(actual, expected)
    assert tokens[0] == 60


def test_hooks_on_the_model_see_stocks_shapes() -> None:
    model, inputs, shapes = tiny("llama"), batch([9, 4]), []
    hook = model.register_forward_hook(lambda module, args, kwargs, out: shapes.append(
        (tuple(kwargs["input_ids"].shape), tuple(out.logits.shape[:2]))
    ), with_kwargs=True)  # fmt: skip
    with torch_paged.paged(model):
        generate(model, inputs, max_new_tokens=2)
    hook.remove()
    assert shapes == [((2, 9), (2, 1)), ((2, 1), (2, 1))]


def test_packed_prefill_reads_blocks_alone() -> None:
    model, inputs = tiny("llama"), batch([30, 4])
    with torch_paged.paged(model), count_calls() as calls:
        generate(model, inputs, max_new_tokens=1)
    assert (calls["gather"], calls["paged.attention"]) == (0, 3)


class TestPlan:
    """The plan of passes, by itself."""

    def test_every_token_is_in_one_piece(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(100):
            rows = [rng.integers(0, 2, size=rng.integers(1, 12)) for _ in range(rng.integers(1, 9))]
            num_tokens = np.array([len(row) for row in rows])
            at_least, most = int(rng.integers(0, 4)), int(rng.integers(1, 20))
            passes = plan_passes(num_tokens, np.zeros_like(num_tokens), Sharing.of(rows, at_least), most)
            held: list[list[int]] = [[] for _ in rows]
            for part in passes:
                assert 0 < part.num_tokens(len(rows)).sum() <= most
                for row, first, end in part.pieces:
                    assert first == len(held[row])
                    held[row] += rows[row][first:end].tolist()
                for row, source, common in part.forks:
                    assert len(held[source]) == common and not held[row]
                    held[row] = list(held[source])
            assert held == [row.tolist() for row in rows]
            if at_least == 1:
                prefixes = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
                assert sum(int(part.num_tokens(len(rows)).sum()) for part in passes) == len(prefixes)


@pytest.mark.parametrize(
    "knobs, error, message",
    [
        ({"max_prefill_tokens": 0}, ValueError, "max_prefill_tokens: 0; must be at least 1"),
        ({"max_prefill_tokens": 2.0}, TypeError, "max_prefill_tokens: float; must be an int"),
        ({"min_shared_prefix": -1}, ValueError, "min_shared_prefix: -1; must be at least 0"),
        ({"drop_finished_rows": 1}, TypeError, "drop_finished_rows: int; must be a bool"),
    ],
)
def test_knobs_out_of_range(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_paged.PagedConfig(**knobs)
