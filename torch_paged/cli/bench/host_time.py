"""Times what cache and attention function cost the host in each layer of a decode step, besides the ops they call."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from torch_paged.cli.bench.timing import Timing

if TYPE_CHECKING:
    from torch_paged.hf.support import Support

# As modules of Llama's kind run on a CPU, where the rotary embedding is in the write, and as all others run.
WAYS = ("rotate_and_update", "update")
# Of Qwen2.5-0.5B.
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64


class _Clock:
    """Seconds in the ops since the last `take`."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def around(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = op(*args, **kwargs)
            self._seconds += time.perf_counter() - start
            return result

        return timed

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@contextmanager
def _timed_ops(clock: _Clock) -> Iterator[None]:
    from torch_paged.hf import attention, layer

    ops = layer._reshape_and_cache, layer._rope_and_cache, attention._attention
    timed = map(clock.around, ops)
    layer._reshape_and_cache, layer._rope_and_cache, attention._attention = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        layer._reshape_and_cache, layer._rope_and_cache, attention._attention = ops


def measure(batch: int, layers: int, context: int, block_size: int, steps: int, way: str) -> tuple[Timing, Timing]:
    """Time decode steps through the cache and the attention function, in a pass as a patched model makes it.

    Args:
        batch: rows, all of the same length.
        layers: of the model.
        context: tokens of each row before the first step. What an op reads leaves less of the processor's caches to
            Python: host time grows with it.
        block_size: tokens of a block.
        steps: decode steps.
        way: of `WAYS`.

    Returns:
        Seconds per layer outside the ops (the two clocks around them, a microsecond, included), and inside them.
    """
    from transformers import LlamaConfig

    from torch_paged.hf import PagedCache
    from torch_paged.hf.announce import announced, make_call
    from torch_paged.hf.attention import attend_rows, paged_attention
    from torch_paged.hf.layer import token_rows

    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=layers,
    )
    cache, module, clock = PagedCache(config, block_size=block_size), nn.Module(), _Clock()
    outside, inside = list[float](), list[float]()

    def step(width: int) -> None:
        query, key, value = (
            torch.randn(batch, width, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        rows = [token_rows(states) for states in (query, key, value)]
        angles = torch.ones(2, batch * width, HEAD_DIM).unbind()
        ids = torch.zeros(batch, width, dtype=torch.long)
        call = make_call(cache, {"input_ids": ids}, native=True, say=refuse)

        def attention(number: int) -> None:
            """Of a layer, which lets go of what the cache gave it, as the modules of a model do."""
            if way == "update":
                keys, values = cache.update(key, value, number)
                paged_attention(module, query, keys, values, None)
                return
            layer = cache.layers[number]
            rotated = layer.rotate_and_update(*rows, *angles, width)
            attend_rows(module, rotated, layer, layer.group.step, None, None, 0.0)

        clock.take()
        with announced(cache, call):
            start = time.perf_counter()
            for number in range(layers):
                attention(number)
            seconds = time.perf_counter() - start
        ops = clock.take()
        outside.append((seconds - ops) / layers)
        inside.append(ops / layers)

    with torch.no_grad(), _timed_ops(clock):
        step(context)
        # The first decode step plans, and warms up.
        step(1)
        outside.clear()
        inside.clear()
        for _ in range(steps):
            step(1)
    return Timing.of(outside), Timing.of(inside)


def refuse(support: "Support") -> NoReturn:
    """For passes that must not be gathered."""
    raise AssertionError(support.reason)
