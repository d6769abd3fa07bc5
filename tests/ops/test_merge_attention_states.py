"""merge_attention_states against the oracle, and against attention over all the keys at once."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_as_exact_as_torch, assert_rejects, largest_error
from tests.paged_batch import paged_batch
from torch_paged import ops

OP = "merge_attention_states"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def build(num_tokens=7, num_heads=3, head_dim=16, *, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def out():
        # Heads of a wider tensor, so that token and head strides are their own.
        wide = torch.randn(num_tokens, 2 * num_heads, head_dim + 8, generator=generator).to(dtype)
        return wide.to(device)[:, ::2, :head_dim]

    def lse():
        return (torch.randn(num_tokens, num_heads, generator=generator) * 5).to(device).T

    return {"out_a": out(), "lse_a": lse(), "out_b": out(), "lse_b": lse()}


def merge_in(dtype, out_a, lse_a, out_b, lse_b):
    """What one would write in PyTorch without care for the dtype."""
    weight = torch.sigmoid((lse_a - lse_b).to(dtype)).T[:, :, None]
    return out_a * weight + out_b * (1 - weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 3, 16), (1, 1, 1), (300, 8, 128), (5, 2, 33), (0, 4, 8), (4, 0, 8)], ids=str)
def test_matches_reference(backend, sizes, dtype):
    arguments = build(*sizes, dtype=dtype, device=backend)
    copies = {name: tensor.clone() for name, tensor in arguments.items()}
    out, lse = ops.merge_attention_states(**arguments)
    exact_out, exact_lse = reference.merge_attention_states(**arguments)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32 and lse.is_contiguous()
    assert_as_exact_as_torch(out, exact_out, merge_in(dtype, **arguments))
    assert largest_error(lse, exact_lse) <= 1e-5
    assert all(torch.equal(tensor, copies[name]) for name, tensor in arguments.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_side_that_saw_nothing_is_not_read(backend, dtype):
    arguments = build(num_tokens=4, dtype=dtype, device=backend)
    for blind, (name_out, name_lse) in enumerate((("out_a", "lse_a"), ("out_b", "lse_b"))):
        for token in (blind, 2):
            arguments[name_out][token] = torch.nan
            arguments[name_lse][:, token] = -torch.inf
    out, lse = ops.merge_attention_states(**arguments)
    assert torch.equal(out[0], arguments["out_b"][0]) and torch.equal(lse[:, 0], arguments["lse_b"][:, 0])
    assert torch.equal(out[1], arguments["out_a"][1]) and torch.equal(lse[:, 1], arguments["lse_a"][:, 1])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    seen_by_both = {name: tensor[:, 3:] if "lse" in name else tensor[3:] for name, tensor in arguments.items()}
    exact_out, exact_lse = reference.merge_attention_states(**seen_by_both)
    assert_as_exact_as_torch(out[3:], exact_out, merge_in(dtype, **seen_by_both))
    assert largest_error(lse[:, 3:], exact_lse) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [0.5, -torch.inf])
def test_nan_stays_nan(backend, other, dtype):
    arguments = build(num_tokens=2, dtype=dtype, device=backend)
    arguments["lse_a"][:, 0], arguments["lse_b"][:, 0] = torch.nan, other
    arguments["lse_a"][:, 1], arguments["lse_b"][:, 1] = other, torch.nan
    out, lse = ops.merge_attention_states(**arguments)
    assert out.isnan().all() and lse.isnan().all()


def test_far_apart_and_huge(backend):
    arguments = build(num_tokens=2, device=backend)
    arguments["lse_a"].fill_(1e30)
    arguments["lse_b"].fill_(-1e30)
    out, lse = ops.merge_attention_states(**arguments)
    assert torch.equal(out, arguments["out_a"].contiguous()) and torch.equal(lse, arguments["lse_a"].contiguous())


def test_parts_of_the_keys_merge_into_the_whole():
    batch = paged_batch([(1, 40), (1, 33)], block_size=8, head_dim=32, dtype=torch.float64)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    whole, whole_lse = ops.attention_with_lse(**batch.arguments, sinks=sinks)
    front = batch.arguments | {"seq_lens": torch.tensor([16, 16]).int()}
    back = batch.arguments | {"block_table": batch.block_table[:, 2:], "seq_lens": torch.tensor([24, 17]).int()}
    parts = (*ops.attention_with_lse(**front, sinks=sinks), *ops.attention_with_lse(**back))
    out, lse = ops.merge_attention_states(*parts)
    # The parts' lse is float32.
    assert largest_error(out, whole) <= 1e-6 and largest_error(lse, whole_lse.double()) <= 1e-6


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.paged.merge_attention_states.default, tuple(build(dtype=dtype).values()))


BAD = {
    "out_a 2-D": (lambda a: {"out_a": a["out_a"].flatten(1)}, "out_a: shape ["),
    "out_a int32": (lambda a: {"out_a": a["out_a"].int()}, "out_a: int32; must be float32 or bfloat16 or float16"),
    "out_b dtype": (lambda a: {"out_b": a["out_b"].half()}, "out_b: float16; must be float32, like out_a"),
    "out_b tokens": (
        lambda a: {"out_b": torch.ones(9, 3, 16)},
        "out_b: size 9 in dimension 0; must be ",
    ),
    "out_b heads": (lambda a: {"out_b": a["out_b"][:, :2]}, "out_b: size 2 in dimension 1; must be 3"),
    "out_b head_dim": (lambda a: {"out_b": a["out_b"][..., :8]}, "out_b: size 8 in dimension 2; must be 16"),
    "lse_a 1-D": (lambda a: {"lse_a": a["lse_a"].flatten()}, "lse_a: shape ["),
    "lse_a float64": (lambda a: {"lse_a": a["lse_a"].double()}, "lse_a: float64; must be float32"),
    "lse_b heads": (
        lambda a: {"lse_b": a["lse_b"][:2]},
        "lse_b: size 2 in dimension 0; must be 3 (num_heads of out_a)",
    ),
    "lse_b tokens": (lambda a: {"lse_b": torch.ones(3, 9)}, "lse_b: size 9 in dimension 1; must be "),
    "lse_a on meta": (lambda a: {"lse_a": a["lse_a"].to("meta")}, "lse_a: on meta; must be on cpu"),
    "out_b on meta": (lambda a: {"out_b": a["out_b"].to("meta")}, "out_b: on meta; must be on cpu"),
}


@pytest.mark.parametrize("num_tokens", [7, 0])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects_structure(change, message, num_tokens):
    arguments = build(num_tokens)
    assert_rejects("merge_attention_states", arguments | change(arguments), message)


@pytest.mark.parametrize("name", ["out_a", "out_b"])
def test_rejects_strides(name):
    arguments = build() | {name: torch.ones(7, 3, 32)[..., ::2]}
    assert_rejects("merge_attention_states", arguments, f"{name}: strides [96, 32, 2]; must be contiguous in the last")
