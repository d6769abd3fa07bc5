"""Rotary embeddings are fused into the cache write, in each form in which models write them; look-alikes are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.assertions import assert_as_exact_as_torch

from .decoder import BLOCK_SIZE, HEAD_DIM, HEADS, KV_HEADS, ROTATIONS, Decoder, Step, angles, decode, half_split
from .lowered import Lowered

Caches = list[tuple[Tensor, Tensor]]


def written(caches: Caches) -> Tensor:
    return torch.cat([cache.flatten() for pair in caches for cache in pair]).nan_to_num(0.0)


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_each_pairing(fuse: bool, lowered: Lowered) -> None:
    model = Decoder(*ROTATIONS)
    eager, compiled = model.new_caches(), model.new_caches()
    options = {"fuse_rope": fuse, "prepack": False, "merge_projections": False}
    step = torch.compile(model, backend="torch_paged", fullgraph=True, options=options)
    expected, logits = decode(model, eager), decode(step, compiled)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(written(compiled), written(eager), atol=1e-5, rtol=1e-5)
    assert lowered.count("paged.rope_and_cache") == (4 if fuse else 0)
    assert lowered.count("paged.reshape_and_cache") == (0 if fuse else 4)


def one_write(
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A step of one layer, and its arguments: query, key, value, caches."""
    generator = torch.Generator().manual_seed(0)
    step = Step([3, 6, 2])
    rows = [torch.randn(3, heads, 1, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    caches = [torch.zeros(12, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2)]

    def run(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        query, key = rotate(query, key)
        query, key, value = (each.transpose(1, 2).reshape(-1, each.shape[1], HEAD_DIM) for each in (query, key, value))
        torch.ops.paged.reshape_and_cache(key, value, *caches, step.slot_mapping)
        return torch.ops.paged.attention(query, *caches, step.block_table, step.seq_lens, step.cu_seqlens_q, 1)

    return run, [*rows, *caches]


def turned(dtype: torch.dtype, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[2], [5], [1]]), dtype))
    return half_split(query, cos, sin), half_split(key, cos, sin)


@torch.no_grad()
def test_as_exact_as_unfused_in_bfloat16(lowered: Lowered) -> None:
    run, arguments = one_write(lambda *rows: turned(torch.bfloat16, *rows), torch.bfloat16)
    compiled = [each.clone() for each in arguments]
    out = torch.compile(run, backend="torch_paged", fullgraph=True)(*compiled)
    assert lowered.count("paged.rope_and_cache") == 1
    exact_run, _ = one_write(lambda *rows: turned(torch.float64, *rows), torch.float64)
    exact = [each.double() for each in arguments]
    assert_as_exact_as_torch(out, exact_run(*exact), run(*arguments))
    assert_as_exact_as_torch(compiled[3], exact[3], arguments[3])


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_tokens_in_one_row(batch: int, lowered: Lowered) -> None:
    """As in a packed pass of transformers, `[1, heads, tokens, head_dim]`; the first of two rows is not all of them."""
    step, caches = Step([3, 6, 2]), Decoder("half split").new_caches(12)[0]
    rows = [torch.randn(batch, heads, 3, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def run(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        cos, sin = (each[:, None] for each in angles("half split", step.seq_lens[None] - 1, torch.float32))
        query, key = half_split(query, cos, sin), half_split(key, cos, sin)
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        torch.ops.paged.reshape_and_cache(key, value, *caches, step.slot_mapping)
        return torch.ops.paged.attention(query, *caches, step.block_table, step.seq_lens, step.cu_seqlens_q, 1)

    eager, compiled = ([cache.zero_().clone() for cache in caches] for _ in range(2))
    out = torch.compile(run, backend="torch_paged", fullgraph=True)(*rows, *compiled)
    torch.testing.assert_close(out, run(*rows, *eager))
    torch.testing.assert_close(compiled, eager)
    assert lowered.count("paged.rope_and_cache") == (1 if batch == 1 else 0)


def in_chunks(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Halves that come of `chunk`, and products the other way around."""
    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[2], [5], [1]]), torch.float32))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return sin * torch.cat((-second, first), -1) + cos * x

    return rotated(query), rotated(key)


def angles_apart(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same angles, spread over the pairs for query and key apart, as in GPT-J."""

    def rotated(x: Tensor) -> Tensor:
        halves = [angle[..., : HEAD_DIM // 2] for angle in (cos, sin)]
        return half_split(x, *(torch.cat((half, half), -1) for half in halves))

    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[2], [5], [1]]), torch.float32))
    return rotated(query), rotated(key)


def upcast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Computed in float32 for bfloat16, as where rounding the products would cost accuracy."""
    query, key = turned(torch.float32, query.float(), key.float())
    return query.bfloat16(), key.bfloat16()


@pytest.mark.parametrize(
    ("rotate", "dtype"), [(in_chunks, torch.float32), (angles_apart, torch.float32), (upcast, torch.bfloat16)]
)
@torch.no_grad()
def test_other_ways_to_write_it(
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype, lowered: Lowered
) -> None:
    run, arguments = one_write(rotate, dtype)
    compiled = [each.clone() for each in arguments]
    out = torch.compile(run, backend="torch_paged", fullgraph=True)(*compiled)
    assert lowered.count("paged.rope_and_cache") == 1
    torch.testing.assert_close(out, run(*arguments))
    torch.testing.assert_close(compiled[3], arguments[3])


def per_head(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Angles that differ from head to head."""
    turn = torch.arange(KV_HEADS).float()[:, None, None].expand(KV_HEADS, 1, HEAD_DIM)
    double = turn.repeat_interleave(HEADS // KV_HEADS, 0)
    return half_split(query, double.cos(), double.sin()), half_split(key, turn.cos(), turn.sin())


def another_angle(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    first, _ = turned(torch.float32, query, key)
    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[1], [1], [1]]), torch.float32))
    return first, half_split(key, cos, sin)


def spread_otherwise(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same angles at first, then in another order for keys."""
    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[2], [5], [1]]), torch.float32))
    return half_split(query, cos.roll(1, 0), sin.roll(1, 0)), half_split(key, cos.roll(2, 0), sin.roll(2, 0))


def key_alone(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query, turned(torch.float32, query, key)[1]


def other_sign(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (each[:, None] for each in angles("half split", torch.tensor([[2], [5], [1]]), torch.float32))
    half = HEAD_DIM // 2

    def back(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., :half], x[..., half:]), -1) * sin

    return back(query), back(key)


@pytest.mark.parametrize("rotate", [per_head, another_angle, spread_otherwise, key_alone, other_sign])
@torch.no_grad()
def test_what_only_looks_alike_is_left_alone(
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], lowered: Lowered
) -> None:
    run, arguments = one_write(rotate, torch.float32)
    compiled = [each.clone() for each in arguments]
    out = torch.compile(run, backend="torch_paged", fullgraph=True)(*compiled)
    torch.testing.assert_close(out, run(*arguments), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled[3], arguments[3], atol=1e-5, rtol=1e-5)
    assert lowered.count("paged.rope_and_cache") == 0 and lowered.count("paged.reshape_and_cache") == 1
