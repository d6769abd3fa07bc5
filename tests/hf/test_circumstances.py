"""What `generate` saves, it saves in ragged batches, over sliding layers, in spread models, threads, after errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import torch_paged
from torch_paged import PagedHandle

from .counting import count_calls
from .models import PAD, assert_same_tokens, batch, generate, tiny, twin
from .raising import Raises
from .test_leaving import Wishes
from .test_threads import in_threads
from .test_training import _gradients, _loss
from .waits import Waits

BLOCK, NEW = 4, 7
# One block of the three layers of the tiny models: K and V, 2 heads of 16, float32.
BLOCK_BYTES = 3 * 2 * BLOCK * 2 * 16 * 4
OPTIONS: dict[str, Any] = dict(eos_token_id=None, max_new_tokens=NEW)
NAMES = ["llama", "qwen2-sliding"]
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb",
         "lm_head"]  # fmt: skip
ON_DISK = {"model.layers.1", "model.layers.2", "lm_head"}
Generate = Callable[..., None]


@contextmanager
def through(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens that come through the last layer in each pass; a pass that runs out of blocks does not get there."""
    mlp = model.model.layers[-1].mlp
    forward, counts = mlp.forward, list[int]()

    def counted(states: Tensor) -> Tensor:
        counts.append(states.shape[0] * states.shape[1])
        return forward(states)

    with mock.patch.object(mlp, "forward", counted):
        yield counts


# Calls that show what is saved, all of them with left padding.


def _beams(generate: Generate, seed: int) -> None:
    generate(batch([21, 9], seed), num_beams=3)


def _like_rows(generate: Generate, seed: int) -> None:
    """Of four rows one is another one again, and one is another but for its last two tokens."""
    inputs = batch([21, 9, 21, 21], seed)
    inputs["input_ids"][2:] = inputs["input_ids"][:1]
    inputs["input_ids"][3, -2:] += 1
    generate(inputs)


def _ragged(generate: Generate, seed: int) -> None:
    generate(batch([40, 7, 23], seed))


def _ends_early(generate: Generate, seed: int) -> None:
    generate(batch([17, 4, 30], seed), stopping_criteria=[Wishes(30, [3, NEW, 5])])


def _four_rows(generate: Generate, seed: int) -> None:
    generate(batch([21, 9, 17, 30], seed))


def _twice(generate: Generate, seed: int) -> None:
    for _ in range(2):
        generate(batch([21, 9], seed))


def _repeats_itself(generate: Generate, seed: int) -> None:
    ids = batch([9], seed)["input_ids"].repeat(1, 4)
    ids[:, 0] = PAD
    generate({"input_ids": ids, "attention_mask": (ids != PAD).long()}, prompt_lookup_num_tokens=3)


@dataclass(frozen=True)
class Saving:
    """
    Attributes:
        calls: one `generate` or several.
        tokens: that come through in each pass; None = as many as in stock, but for the pad of the prompt.
        in_order: False where passes depend on what else is in the pool: then their sum counts.
        num_blocks: all there are; 0 = enough.
    """

    calls: Callable[[Generate, int], None]
    tokens: list[int] | None
    in_order: bool = True
    num_blocks: int = 0
    knobs: tuple[tuple[str, Any], ...] = ()

    def patch(self, model: PreTrainedModel) -> PagedHandle:
        memory = {"max_memory": self.num_blocks * BLOCK_BYTES} if self.num_blocks else {}
        return torch_paged.patch(model, block_size=BLOCK, **memory, **dict(self.knobs))


def _steps(rows: int) -> list[int]:
    # The first new token comes from the prompt.
    return [rows] * (NEW - 1)


SAVINGS = {
    "expanded prompts": Saving(_beams, [21 + 9, *_steps(2 * 3)]),
    "like rows": Saving(_like_rows, [19 + 9, 2 + 2, *_steps(4)], knobs=(("min_shared_prefix", 8),)),
    "padding": Saving(_ragged, [16, 16, 16, 16, 6, *_steps(3)], knobs=(("max_prefill_tokens", 16),)),
    "finished rows": Saving(_ends_early, [17 + 4 + 30, 3, 3, 2, 2, 1, 1]),
    # What two threads need at most, when one has a single row left and the other runs all of its own.
    "memory": Saving(_four_rows, [21 + 9 + 17 + 30, *_steps(4)], in_order=False, num_blocks=16),
    "prefixes": Saving(
        _twice, [21 + 9, *_steps(2), (21 - 20) + (9 - 8), *_steps(2)], knobs=(("prefix_caching", True),)
    ),
    "speculation": Saving(_repeats_itself, None),
}  # fmt: skip


@dataclass
class Run:
    """What the calls of one saving were given and returned."""

    inputs: list[dict[str, Tensor]]
    sequences: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, saving: Saving, seed: int = 0, **extra: Any) -> Run:
        run = cls([], [])

        def one(inputs: dict[str, Tensor], **kwargs: Any) -> None:
            run.inputs.append(inputs)
            run.sequences.append(generate(model, inputs, **(OPTIONS | kwargs | extra)))

        saving.calls(one, seed)
        return run


def check(saving: Saving, stock: PreTrainedModel, handle: PagedHandle, counts: list[int], runs: list[Run]) -> None:
    """Stock's tokens, by as many tokens through the model as `saving` says for each run, and no block held."""
    expected: list[int] = []
    for seed, run in enumerate(runs):
        with through(stock) as computed:
            want = Run.of(stock, saving, seed)
        for prompt, sequences, actual in zip(want.inputs, want.sequences, run.sequences, strict=True):
            assert_same_tokens(stock, sequences, actual, prompt)
        expected += [computed[0] - 1, *computed[1:]] if saving.tokens is None else saving.tokens
    if not saving.in_order:
        assert sum(counts) == sum(expected)
    elif len(runs) == 1:
        assert counts == expected
    else:
        assert Counter(counts) == Counter(expected)
    stats = handle.stats()
    assert stats.peak_bytes > 0 and stats.blocks_used == stats.blocks_cached
    if saving.num_blocks:
        assert stats.peak_bytes <= 2 * saving.num_blocks * BLOCK_BYTES
    handle.flush()
    assert handle.stats().blocks_used == 0


def _on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    device_map = {part: "disk" if part in ON_DISK else "cpu" for part in PARTS}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


def _in_memory(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device=torch.device("cpu"))


SPREAD = [(_on_disk, saving) for saving in SAVINGS]
# Stock's candidates fail in a model that has no parameter on a device.
SPREAD += [(_in_memory, saving) for saving in SAVINGS if saving != "speculation"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("spread", "saving"), SPREAD)
def test_a_model_spread_by_accelerate(spread: Any, saving: str, name: str, tmp_path: Path) -> None:
    stock = tiny(name)
    model = spread(twin(stock), tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    handle = SAVINGS[saving].patch(model)
    with through(model) as counts, count_calls() as calls:
        run = Run.of(model, SAVINGS[saving])
    assert calls["gather"] == 0 < calls["paged.attention"]
    check(SAVINGS[saving], stock, handle, counts, [run])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saving", SAVINGS)
def test_two_threads(saving: str, name: str) -> None:
    """With prompts of their own, in one pool."""
    stock = tiny(name)
    model = twin(stock)
    each = SAVINGS[saving]
    if each.num_blocks:
        each = Saving(each.calls, each.tokens, each.in_order, num_blocks=40, knobs=each.knobs)
    handle = each.patch(model)
    with through(model) as counts:
        runs = in_threads([lambda seed=seed: Run.of(model, each, seed) for seed in range(2)])
    assert all(isinstance(run, Run) for run in runs), runs
    check(each, stock, handle, counts, runs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("saving", SAVINGS)
def test_after_a_processor_raised_in_mid_run(saving: str, at: int, name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    handle = SAVINGS[saving].patch(model)
    # So that rows that do not fit take turns, as without a processor of one's own.
    known = mock.patch("torch_paged.hf.pressure.works_row_by_row", lambda *_: True)
    with known if SAVINGS[saving].num_blocks else nullcontext(), pytest.raises(ZeroDivisionError) as raised:
        Run.of(model, SAVINGS[saving], logits_processor=LogitsProcessorList([Raises(at)]))
    stats = handle.stats()
    # The traceback still holds generate's frames, and no block all the same.
    assert raised.value.__traceback__ is not None and stats.blocks_used == stats.blocks_cached
    handle.flush()
    with through(model) as counts:
        run = Run.of(model, SAVINGS[saving])
    check(SAVINGS[saving], stock, handle, counts, [run])


def _spread_in_memory(model: PreTrainedModel) -> PreTrainedModel:
    return dispatch_model(model, dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)


def _rollouts_in_threads(model: PreTrainedModel) -> PreTrainedModel:
    in_threads([lambda seed=seed: generate(model, batch([14, 6], seed), **OPTIONS) for seed in (5, 6)])
    return model


def _rollout_that_fails(model: PreTrainedModel) -> PreTrainedModel:
    with pytest.raises(ZeroDivisionError):
        generate(model, batch([14, 6], seed=5), logits_processor=LogitsProcessorList([Raises(3)]), **OPTIONS)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("circumstance", [_spread_in_memory, _rollouts_in_threads, _rollout_that_fails])
def test_rollouts_before_a_training_step(circumstance: Callable[..., PreTrainedModel], name: str) -> None:
    """Twice: a rollout over remembered prefixes, no block held before backward, stock's gradients, all forgotten."""
    stock = tiny(name)
    model = twin(stock)
    handle = torch_paged.patch(model, block_size=BLOCK, prefix_caching=True)
    inputs = batch([21, 9])
    model = circumstance(model)
    for _ in range(2):
        with through(model) as counts:
            tokens = [generate(each.eval(), inputs, **OPTIONS) for each in (stock, model, model)]
        assert counts[0] == 21 + 9 and counts[NEW] == (21 - 20) + (9 - 8)
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
        gradients = []
        for each in (stock, model):
            optimizer = torch.optim.SGD(each.parameters(), lr=1e-2)
            loss = _loss(each.train(), {"input_ids": tokens[0], "attention_mask": torch.ones_like(tokens[0])})
            assert each is stock or handle.stats().blocks_used == 0
            loss.backward()
            gradients.append(_gradients(each))
            optimizer.step()
            optimizer.zero_grad()
        assert len(gradients[0]) > 10
        assert all(torch.equal(want, got) for want, got in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_spread_model_waits_once(name: str, tmp_path: Path) -> None:
    model = _on_disk(tiny(name), tmp_path)
    with torch_paged.paged(model):
        assert _waits(model, 12) - _waits(model, 4) == 8


def _waits(model: PreTrainedModel, steps: int) -> int:
    counted: Counter[str] = Counter()
    with Waits(counted):
        generate(model, batch([17, 4, 30]), max_new_tokens=steps, eos_token_id=None)
    return counted.total()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_once_beside_another_thread_and_after_an_error(name: str) -> None:
    model = tiny(name)

    def measured() -> int:
        return _waits(model, 12) - _waits(model, 4)

    with torch_paged.paged(model, block_size=BLOCK):
        assert in_threads([measured, measured]) == [8, 8]
        _rollout_that_fails(model)
        assert measured() == 8
