"""The demo's four uses of generate, each run stock and paged with what it cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, set_seed

import torch_paged
from torch_paged.memory import PoolStats

SEED = 0


@dataclass(frozen=True)
class Workload:
    """One call of generate."""

    name: str
    prompts: list[str]
    options: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one call of generate gave.

    Attributes:
        tokens: `[rows, length]`, on the CPU, prompts included.
        new_tokens: generated tokens, without the padding of rows that ended early.
        seconds: of the whole call.
    """

    tokens: Tensor
    new_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


@dataclass(frozen=True)
class Comparison:
    """A workload run stock and paged.

    Attributes:
        stock_kv_bytes: keys and values in stock's cache at its end, when it is largest.
        stats: of the pool when generate had returned and its cache was still held.
        texts: per row, what stock wrote, prompt included.
        paged_texts: likewise, what the patched model wrote.
    """

    workload: Workload
    stock: Run
    paged: Run
    stock_kv_bytes: int
    stats: PoolStats
    texts: list[str]
    paged_texts: list[str]

    @property
    def same_tokens(self) -> bool:
        return torch.equal(self.stock.tokens, self.paged.tokens)

    @property
    def stock_waste(self) -> float:
        """The part of stock's bytes that holds padding, or what another row holds too."""
        return 1 - self.stats.bytes_useful / self.stock_kv_bytes if self.stock_kv_bytes else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.name,
            "rows": len(self.stock.tokens),
            "new_tokens": self.stock.new_tokens,
            "same_tokens": self.same_tokens,
            "tokens_per_s": {"stock": self.stock.tokens_per_s, "paged": self.paged.tokens_per_s},
            "peak_kv_bytes": {"stock": self.stock_kv_bytes, "paged": self.stats.peak_bytes},
            "waste": {"stock": self.stock_waste, "paged": self.stats.waste},
            "blocks_shared": self.stats.peak_blocks_shared,
            "texts": {"stock": self.texts, "paged": self.paged_texts},
        }


def workloads(prompts: list[str], batch: int) -> list[Workload]:
    """The four uses, over prompts that fill the ragged batch whole first and shortened after that."""
    ragged = [_shortened(prompts[row % len(prompts)], row // len(prompts) + 1) for row in range(batch)]
    return [
        Workload("single prompt", prompts[:1], {}),
        Workload(f"ragged batch of {batch}", ragged, {}),
        Workload("4 beams", prompts[:1], {"num_beams": 4}),
        Workload("8 samples", prompts[:1], {"do_sample": True, "num_return_sequences": 8}),
    ]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    workload: Workload,
    max_new_tokens: int,
    advance: Callable[[], None],
) -> Comparison:
    """Run a workload on the model as it is, then on the same model patched.

    Args:
        model: a model of transformers that can generate.
        tokenizer: its tokenizer, with a pad token.
        workload: what to run.
        max_new_tokens: of each row.
        advance: called at every decoding step of both.
    """
    stock, cache = _generate(model, tokenizer, workload, max_new_tokens, advance)
    stock_kv_bytes = _cache_bytes(cache)
    with torch_paged.paged(model) as handle:
        paged, cache = _generate(model, tokenizer, workload, max_new_tokens, advance)
        stats = handle.stats()
        del cache
    return Comparison(
        workload=workload,
        stock=stock,
        paged=paged,
        stock_kv_bytes=stock_kv_bytes,
        stats=stats,
        texts=tokenizer.batch_decode(stock.tokens, skip_special_tokens=True),
        paged_texts=tokenizer.batch_decode(paged.tokens, skip_special_tokens=True),
    )


class _Progress(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; generate calls it once a step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    workload: Workload,
    max_new_tokens: int,
    advance: Callable[[], None],
) -> tuple[Run, Any]:
    """Return the run, and the cache that it used: its blocks are held as long as it lives."""
    inputs = tokenizer(workload.prompts, return_tensors="pt", padding=True).to(model.device)
    set_seed(SEED)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        stopping_criteria=[_Progress(advance)],
        **{"do_sample": False, **workload.options},
    )
    tokens = output.sequences.cpu()
    seconds = time.perf_counter() - start
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return Run(tokens, _count_until_end(new, model.generation_config.eos_token_id), seconds), output.past_key_values


def _count_until_end(new: Tensor, end: int | list[int] | None) -> int:
    """Count each row's tokens up to its first end-of-sequence token, that one included."""
    ends = torch.isin(new, torch.tensor([] if end is None else end, dtype=new.dtype))
    before = ends.cumsum(1) - ends.int() == 0
    return int(before.sum())


def _cache_bytes(cache: Any) -> int:
    layers = getattr(cache, "layers", [])
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _shortened(prompt: str, times: int) -> str:
    """Return the first 1/times of a prompt's words, at least one."""
    if times == 1:
        return prompt
    words = prompt.split()
    return " ".join(words[: max(1, len(words) // times)])
