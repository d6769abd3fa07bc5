"""TRL's GRPOTrainer over a model that is patched once: the same samples, gradients and weights as stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

import torch_paged

from .counting import count_calls
from .models import batch, generate, tiny, tiny_tokenizer, twin

trl = pytest.importorskip("trl", reason="needs trl: pip install 'torch_paged[dev]'")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'torch_paged[dev]'")

LETTERS = "ABCDEFGHIJKLMNOP"
PROMPTS = [LETTERS[:9], LETTERS[5:8]]
STEPS, SAMPLES, NEW = 2, 4, 12
ASKED = batch([21, 9])


class Watch(TrainerCallback):  # type: ignore[misc]
    """What a run shows: samples, gradients before each step, answers of the evaluated model after it."""

    def __init__(self, handle: torch_paged.PagedHandle | None) -> None:
        self.handle = handle
        self.samples: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        self.answers: list[Tensor] = []
        self.bytes_before_backward: list[int] = []
        self.hits: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        model.eval()
        for _ in range(2):
            self.answers.append(generate(model, ASKED))
            if self.handle is not None:
                self.hits.append(self.handle.stats().prefix_hits)
        model.train()


def run(model: PreTrainedModel, folder: Path, handle: torch_paged.PagedHandle | None = None) -> Watch:
    watch = Watch(handle)

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """Between a rollout and its backward pass."""
        watch.samples += [torch.tensor(ids) for ids in completion_ids]
        if handle is not None:
            watch.bytes_before_backward.append(handle.stats().bytes_held)
        return [float(sum(token % 5 for token in ids)) for ids in completion_ids]

    config = trl.GRPOConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=SAMPLES, num_generations=SAMPLES,
        max_completion_length=NEW, learning_rate=1e-2, beta=0.0, seed=5, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    prompts = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tiny_tokenizer(),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return watch


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_two_steps_of_grpo_are_those_of_stock(name: str, tmp_path: Path) -> None:
    stock = tiny(name)
    model = twin(stock)
    expected = run(stock, tmp_path)
    handle = torch_paged.patch(model, block_size=4, prefix_caching=True)
    with count_calls() as calls:
        actual = run(model, tmp_path, handle)
    assert calls["paged.attention"] > 0 == calls["gather"], "the rollouts page"

    assert len(expected.gradients) == len(actual.gradients) == STEPS
    assert len(expected.samples) == len(actual.samples) == STEPS * SAMPLES
    assert all(torch.equal(a, b) for a, b in zip(expected.samples, actual.samples, strict=True))
    for ours, stocks in zip(actual.gradients, expected.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, stocks, strict=True))
    trained = zip(model.parameters(), stock.parameters(), tiny(name).parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, before) for a, b, before in trained)

    # Training keeps no blocks, so that backward has the memory, and a step of the optimizer leaves nothing behind.
    assert actual.bytes_before_backward == [0] * STEPS
    assert actual.hits == [0, 2, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(expected.answers, actual.answers, strict=True))
