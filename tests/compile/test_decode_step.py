"""A decode step of two layers: one compilation for growing sequences, no cache copied, and the graph as it is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import ReinplaceCounters

from .decoder import HEAD_DIM, HEADS, KV_HEADS, Decoder, Step, angles, decode, half_split
from .lowered import Lowered

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_one_compilation_and_no_copies(mode: str) -> None:
    model = Decoder()
    counter = CompileCounterWithBackend("torch_paged")
    step = torch.compile(model, backend=counter, fullgraph=True)
    ReinplaceCounters.clear()
    dtype = torch.bfloat16 if mode == "autocast" else torch.float32
    with torch.no_grad(), MODES[mode]():
        expected = decode(model, model.new_caches(dtype=dtype), steps=9)
        logits = decode(step, model.new_caches(dtype=dtype), steps=9)
        # New caches, and sequences that are longer: the same graph.
        decode(step, model.new_caches(dtype=dtype), steps=14)
    torch.testing.assert_close(logits, expected, atol=0.05 if mode == "autocast" else 1e-5, rtol=0)
    assert counter.frame_count == 1
    assert ReinplaceCounters.get_total_missed_bytes() == 0


@torch.no_grad()
def test_any_batch(lowered: Lowered) -> None:
    """The second batch size makes the size vary; the passes fire there too, and no other graph is compiled."""
    model = Decoder()
    counter = CompileCounterWithBackend("torch_paged")
    step = torch.compile(model, backend=counter, fullgraph=True)
    ReinplaceCounters.clear()
    for batch in (5, 6, 7):
        expected = decode(model, model.new_caches(40), batch)
        torch.testing.assert_close(decode(step, model.new_caches(40), batch), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
    assert ReinplaceCounters.get_total_missed_bytes() == 0
    assert lowered.count("paged.rope_and_cache") == 2 * 2
    assert lowered.count("paged.packed_linear") == 2 * (2 * 4 + 1)


def two_layers(query: Tensor, key: Tensor, value: Tensor, step: Step, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
    cos, sin = (each[:, None] for each in angles("half split", step.seq_lens[:, None] - 1, query.dtype))
    for pair in caches:
        turned, rows = half_split(query, cos, sin), half_split(key, cos, sin)
        turned, rows, new = (each.transpose(1, 2).flatten(0, 1) for each in (turned, rows, value))
        torch.ops.paged.reshape_and_cache(rows, new, *pair, step.slot_mapping)
        query = torch.ops.paged.attention(turned, *pair, step.block_table, step.seq_lens, step.cu_seqlens_q, 1)
        query = query[:, :, None]
    return query


@torch.no_grad()
def test_the_graph(lowered: Lowered) -> None:
    rows = [torch.ones(2, heads, 1, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    step, caches = Step([3, 6]), Decoder().new_caches()
    torch.compile(two_layers, backend="torch_paged", fullgraph=True)(*rows, step, caches)
    [graph] = lowered.graphs
    code = re.sub(r";.*", "", graph.code).strip()
    assert_expected_inline(
        code,
        """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, arg6_1, arg7_1, arg8_1, arg9_1, arg10_1):
    unsqueeze = torch.ops.aten.unsqueeze.default(arg0_1, 1)
    sub = torch.ops.aten.sub.Tensor(unsqueeze, 1)
    unsqueeze_1 = torch.ops.aten.unsqueeze.default(sub, 2)
    convert_element_type = torch.ops.prims.convert_element_type.default(unsqueeze_1, torch.float32)
    iota = torch.ops.prims.iota.default(8, start = 0, step = 2, dtype = torch.int64, device = device(type='cpu'), requires_grad = False)
    div = torch.ops.aten.div.Tensor(iota, 16)
    neg = torch.ops.aten.neg.default(div)
    pow_1 = torch.ops.aten.pow.Scalar(100.0, neg)
    mul = torch.ops.aten.mul.Tensor(convert_element_type, pow_1)
    unsqueeze_2 = torch.ops.aten.unsqueeze.default(mul, 2)
    expand = torch.ops.aten.expand.default(unsqueeze_2, [2, 1, 2, 8])
    clone = torch.ops.aten.clone.default(expand, memory_format = torch.contiguous_format)
    view = torch.ops.aten.reshape.default(clone, [2, 1, 16])
    cos = torch.ops.aten.cos.default(view)
    unsqueeze_3 = torch.ops.aten.unsqueeze.default(cos, 1)
    sin = torch.ops.aten.sin.default(view)
    unsqueeze_4 = torch.ops.aten.unsqueeze.default(sin, 1)
    permute_2 = torch.ops.aten.permute.default(arg3_1, [0, 2, 1, 3])
    view_3 = torch.ops.aten.reshape.default(permute_2, [2, 2, 16])
    permute_5 = torch.ops.aten.permute.default(arg3_1, [0, 2, 1, 3])
    view_6 = torch.ops.aten.reshape.default(permute_5, [2, 2, 16])
    expand_default = torch.ops.aten.expand.default(unsqueeze_3, [2, 2, 1, 16])
    permute_default = torch.ops.aten.permute.default(expand_default, [0, 2, 1, 3])
    reshape_default = torch.ops.aten.reshape.default(permute_default, [2, 2, 16])
    select_int = torch.ops.aten.select.int(reshape_default, 1, 0)
    expand_default_1 = torch.ops.aten.expand.default(unsqueeze_4, [2, 2, 1, 16])
    permute_default_1 = torch.ops.aten.permute.default(expand_default_1, [0, 2, 1, 3])
    reshape_default_1 = torch.ops.aten.reshape.default(permute_default_1, [2, 2, 16])
    select_int_1 = torch.ops.aten.select.int(reshape_default_1, 1, 0)
    permute_default_2 = torch.ops.aten.permute.default(arg1_1, [0, 2, 1, 3])
    reshape_default_2 = torch.ops.aten.reshape.default(permute_default_2, [2, 4, 16])
    permute_default_3 = torch.ops.aten.permute.default(arg2_1, [0, 2, 1, 3])
    reshape_default_3 = torch.ops.aten.reshape.default(permute_default_3, [2, 2, 16])
    rope_and_cache_default_1 = torch.ops.paged.rope_and_cache.default(reshape_default_2, reshape_default_3, view_3, select_int, select_int_1, arg4_1, arg5_1, arg6_1)
    attention = torch.ops.paged.attention.default(rope_and_cache_default_1, arg4_1, arg5_1, arg7_1, arg0_1, arg8_1, 1)
    unsqueeze_5 = torch.ops.aten.unsqueeze.default(attention, 2)
    permute_default_4 = torch.ops.aten.permute.default(unsqueeze_5, [0, 2, 1, 3])
    reshape_default_4 = torch.ops.aten.reshape.default(permute_default_4, [2, 4, 16])
    permute_default_5 = torch.ops.aten.permute.default(arg2_1, [0, 2, 1, 3])
    reshape_default_5 = torch.ops.aten.reshape.default(permute_default_5, [2, 2, 16])
    rope_and_cache_default = torch.ops.paged.rope_and_cache.default(reshape_default_4, reshape_default_5, view_6, select_int, select_int_1, arg9_1, arg10_1, arg6_1)
    attention_1 = torch.ops.paged.attention.default(rope_and_cache_default, arg9_1, arg10_1, arg7_1, arg0_1, arg8_1, 1)
    unsqueeze_6 = torch.ops.aten.unsqueeze.default(attention_1, 2)
    copy_ = torch.ops.aten.copy_.default(arg4_1, arg4_1)
    copy__1 = torch.ops.aten.copy_.default(arg5_1, arg5_1)
    copy__2 = torch.ops.aten.copy_.default(arg9_1, arg9_1)
    copy__3 = torch.ops.aten.copy_.default(arg10_1, arg10_1)
    return (unsqueeze_6,)""",  # noqa: E501
    )
