"""Each op traces in one graph with dynamic shapes and computes the same, in every mode that inference runs in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from tests.paged_batch import paged_batch
from torch_paged import ops

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def attention(num_seqs: int) -> list[Tensor]:
    batch = paged_batch([(1, 5 + i) for i in range(num_seqs)], block_size=8)
    return [batch.query, batch.key_cache, batch.value_cache, batch.block_table, batch.seq_lens, batch.cu_seqlens_q]


def rows(num_seqs: int) -> list[Tensor]:
    """key, value, their caches and slots."""
    caches = [torch.zeros(num_seqs, 4, 2, 16) for _ in range(2)]
    return [torch.randn(num_seqs, 2, 16), torch.randn(num_seqs, 2, 16), *caches, torch.arange(num_seqs) * 4]


def unpacked(num_rows: int) -> list[Tensor]:
    return [torch.randn(num_rows, 16), torch.ones(24, 16)]


def packed(num_rows: int) -> list[Tensor]:
    return [torch.randn(num_rows, 6), ops.pack_linear_weight(torch.ones(5, 6))]


def merged(num_tokens: int) -> list[Tensor]:
    return [torch.randn(num_tokens, 3, 8), torch.randn(3, num_tokens)] * 2


paged = torch.ops.paged
CALLS: dict[str, tuple[Callable[..., object], Callable[[int], list[Tensor]]]] = {
    "attention": (lambda *a: paged.attention(*a, 1), attention),
    "attention_with_lse": (lambda *a: paged.attention_with_lse(*a, 1), attention),
    "gather_cache": (lambda q, k, v, table, lens, cu: paged.gather_cache(k, v, table, lens, 12), attention),
    "merge_attention_states": (paged.merge_attention_states, merged),
    "reshape_and_cache": (paged.reshape_and_cache, rows),
    "rope_and_cache": (lambda k, v, kc, vc, s: paged.rope_and_cache(v, k, v, k[:, 0], k[:, 1], kc, vc, s), rows),
    "copy_blocks": (lambda k, v, kc, vc, s: paged.copy_blocks([kc], [vc], torch.tensor([[0, 1]])), rows),
    "swap_blocks": (lambda k, v, kc, vc, s: paged.swap_blocks([kc], [vc], torch.tensor([[0, 1]])), rows),
    "linear": (lambda x, weight: paged.linear(x, weight, None), unpacked),
    "gated_linear": (lambda x, weight: paged.gated_linear(x, weight, weight, None, None, "silu"), unpacked),
    "qkv_linear": (lambda x, weight: paged.qkv_linear(x, weight, weight, weight, None, None, None, 8), unpacked),
    "rms_norm": (lambda x, weight: paged.rms_norm(x, weight[0], 1e-6), unpacked),
    "packed_linear": (lambda x, weight: paged.packed_linear(x, weight, None, 5), packed),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", CALLS)
def test_traces(op: str, mode: str) -> None:
    call, arguments = CALLS[op]
    compiles = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal compiles
        compiles += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)  # type: ignore[no-any-return]

    compiled = torch.compile(call, backend=counting, fullgraph=True, dynamic=True)
    with MODES[mode]():
        # Numbers that are no other size of the call, which the compiler would take for the same one.
        for size in (5, 6, 7):
            ours = arguments(size)
            eager = [each.clone(memory_format=torch.preserve_format) for each in ours]
            torch.testing.assert_close(compiled(*ours), call(*eager), rtol=0, atol=0, equal_nan=True)
            # Caches too.
            torch.testing.assert_close(ours, eager, rtol=0, atol=0, equal_nan=True)
    assert compiles == 1


def test_every_op_is_here() -> None:
    described = {name for name in ops.__all__ if hasattr(paged, name)}
    assert set(CALLS) == described - {"cpu_instruction_set", "cpu_instruction_sets"}
