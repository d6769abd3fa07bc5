"""gather_cache against the oracle, bit for bit."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_rejects
from tests.paged_batch import memory_of, nan_cache, paged_batch, to_device
from torch_paged import ops

OP = "gather_cache"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def samples():
    """Lengths around the block size, layouts, head sizes that differ, room past the longest, nothing at all."""
    lengths = [9, 0, 1, 4, 13]
    for layout in ("hnd", "nhd", "pool_view", "k_transposed", "unaligned"):
        yield layout, {"lengths": lengths, "layout": layout, "v_head_dim": 24}
    for block_size in (1, 2, 16, 256):
        yield f"block_size {block_size}", {"lengths": lengths, "block_size": block_size}
    yield "odd head_dim", {"lengths": lengths, "head_dim": 5, "v_head_dim": 1}
    yield "room past the longest", {"lengths": lengths, "max_seq_len": 30}
    yield "no sequence", {"lengths": [], "max_seq_len": 7}
    yield "no token", {"lengths": [0, 0], "max_seq_len": 3}
    yield "no room", {"lengths": [0, 0], "max_seq_len": 0}
    yield "long", {"lengths": [700, 3], "block_size": 16, "head_dim": 64}


def build(lengths, *, max_seq_len=None, block_size=4, dtype=torch.float32, device="cpu", **sizes):
    batch = paged_batch([(0, length) for length in lengths], block_size=block_size, dtype=dtype, device=device, **sizes)
    return {
        "key_cache": batch.key_cache,
        "value_cache": batch.value_cache,
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "max_seq_len": max(lengths) if max_seq_len is None else max_seq_len,
    }


def assert_matches_reference(arguments):
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    before = [memory_of(tensor).clone() for tensor in tensors]
    gathered = ops.gather_cache(**arguments)
    for result, expected in zip(gathered, reference.gather_cache(**arguments), strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert all(torch.equal(memory_of(tensor), old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in samples()])
def test_matches_reference_and_touches_nothing(backend, sizes, dtype):
    assert_matches_reference(build(**sizes, dtype=dtype, device=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["hnd", "k_transposed"])
@pytest.mark.parametrize("scales", [(1, None), (None, 2), (2, 1)], ids=str)
def test_multiplies_by_scales(backend, scales, layout, dtype):
    arguments = build([9, 0, 4], layout=layout, dtype=dtype, device=backend)
    for name, size in zip(("key_scale", "value_scale"), scales, strict=True):
        if size:
            arguments[name] = (0.5 + torch.rand(size, generator=torch.Generator().manual_seed(0))).to(backend)
    assert_matches_reference(arguments)


def test_moves_integers(backend):
    key_cache = to_device(nan_cache("nhd", 4, 2, 2, 8, torch.int8), backend)
    key_cache.copy_(torch.arange(4 * 2 * 2 * 8).view(4, 2, 2, 8) % 127)
    table = torch.tensor([[3, 1], [0, -1]], dtype=torch.int32, device=backend)
    assert_matches_reference(
        {
            "key_cache": key_cache,
            "value_cache": key_cache,
            "block_table": table,
            "seq_lens": torch.tensor([3, 1], dtype=torch.int32, device=backend),
            "max_seq_len": 4,
        }
    )


def test_opcheck():
    arguments = build([5, 0, 3], v_head_dim=8)
    for scale in (None, torch.ones(2)):
        torch.library.opcheck(torch.ops.paged.gather_cache.default, (*arguments.values(), scale, scale))


BAD = {
    "key_cache 3-D": (lambda a: {"key_cache": a["key_cache"][0]}, "key_cache: shape [4, 2, 16]; must be 4-D"),
    "key_cache strides": (
        lambda a: {"key_cache": a["key_cache"].repeat_interleave(2, 3)[..., ::2]},
        "key_cache: strides [",
    ),
    "key_cache without head_dim": (lambda a: {"key_cache": a["key_cache"][..., :0]}, "key_cache: shape ["),
    "value_cache dtype": (
        lambda a: {"value_cache": a["value_cache"].half()},
        "value_cache: float16; must be float32, like key_cache",
    ),
    "value_cache heads": (
        lambda a: {"value_cache": a["value_cache"][:, :, :1]},
        "value_cache: size 1 in dimension 2; must be 2 (num_kv_heads of key_cache)",
    ),
    "block_size 3": (
        lambda a: {"key_cache": a["key_cache"][:, :3], "value_cache": a["value_cache"][:, :3]},
        "key_cache: block_size 3; must be a power of two from 1 to 256",
    ),
    "block_table int64": (lambda a: {"block_table": a["block_table"].long()}, "block_table: int64; must be int32"),
    "block_table 1-D": (lambda a: {"block_table": a["block_table"].flatten()}, "block_table: shape ["),
    "seq_lens int64": (lambda a: {"seq_lens": a["seq_lens"].long()}, "seq_lens: int64; must be int32"),
    "seq_lens too many": (lambda a: {"seq_lens": torch.zeros(9).int()}, "seq_lens: size 9 in dimension 0; must be "),
    "max_seq_len too long": (
        lambda a: {"max_seq_len": 2**31},
        "max_seq_len: 2147483648; must be at most 2147483647",
    ),
    "max_seq_len negative": (lambda a: {"max_seq_len": -1}, "max_seq_len: -1; must be at least 0"),
    "key_scale size": (lambda a: {"key_scale": torch.ones(3)}, "key_scale: shape [3]; must be [1] or [2]"),
    "value_scale dtype": (lambda a: {"value_scale": torch.ones(1).half()}, "value_scale: float16; must be float32"),
    "scaled integers": (
        lambda a: (
            {n: torch.ones(6, 4, 2, 8, dtype=torch.int8) for n in ("key_cache", "value_cache")}
            | {"key_scale": torch.ones(1)}
        ),
        "key_cache: int8; must be float32 or bfloat16",
    ),
    "key_cache on meta": (
        lambda a: {"key_cache": a["key_cache"].to("meta")},
        "value_cache: on cpu; must be on meta, like the other tensors",
    ),
    "seq_lens on meta": (lambda a: {"seq_lens": a["seq_lens"].to("meta")}, "seq_lens: on meta; must be on cpu"),
}
BAD_VALUES = {
    "max_seq_len too short": (
        lambda a: {"max_seq_len": 4},
        "max_seq_len: 4; must be at least 5, the length of sequence 0",
    ),
    "seq_lens negative": (lambda a: {"seq_lens": torch.tensor([5, -1]).int()}, "seq_lens: value -1 at [1]; must be in"),
    "seq_lens too long": (
        lambda a: {"seq_lens": torch.tensor([2**31 - 1, 0]).int()},
        "seq_lens: value 2147483647 at [0]; must be in [0, 12] (max_blocks * block_size)",
    ),
    "block missing": (
        lambda a: {"block_table": a["block_table"] * 0 - 1},
        "block_table: value -1 at [0, 0]; must be in [0, 6) (num_blocks), as seq_lens needs this entry",
    ),
    "partly filled block missing": (
        lambda a: {"block_table": torch.tensor([[0, -1], [1, -1]]).int()},
        "block_table: value -1 at [0, 1]; must be in [0, 6) (num_blocks), as seq_lens needs this entry",
    ),
    "block too large": (lambda a: {"block_table": a["block_table"] * 0 + 6}, "block_table: value 6 at [0, 0]; must be"),
    "block_table strides": (
        lambda a: {"block_table": a["block_table"].T.contiguous().T},
        "block_table: strides [1, 2]; must be contiguous in the last dimension",
    ),
}


@pytest.mark.parametrize("lengths", [[5, 3], []], ids=str)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects_structure(change, message, lengths):
    arguments = build(lengths, max_seq_len=5)
    assert_rejects("gather_cache", arguments | change(arguments), message)


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_rejects_values(change, message):
    arguments = build([5, 3])
    assert_rejects("gather_cache", arguments | change(arguments), message)
