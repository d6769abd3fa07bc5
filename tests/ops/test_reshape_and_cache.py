"""reshape_and_cache against the oracle, bit for bit."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_rejects
from tests.paged_batch import memory_of, nan_cache, same_memory, to_device
from torch_paged import ops

OP = "reshape_and_cache"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def samples():
    """Sizes and layouts, slots that skip and jump, one token and many."""
    some = [7, -1, 3, 12, -1, 0, 21]
    yield "hnd", {"slots": some}
    yield "nhd", {"slots": some, "layout": "nhd"}
    yield "pool_view", {"slots": some, "layout": "pool_view"}
    yield "k_transposed", {"slots": some, "layout": "k_transposed"}
    yield "unaligned", {"slots": some, "layout": "unaligned"}
    yield "odd sizes", {"slots": some, "head_dim": 5, "v_head_dim": 3, "num_kv_heads": 1}
    yield "one element a head", {"slots": some, "head_dim": 1, "v_head_dim": 1}
    yield "block_size 1", {"slots": [4, 2], "block_size": 1, "layout": "k_transposed"}
    yield "one token", {"slots": [23]}
    yield "no token", {"slots": []}
    yield "only skipped tokens", {"slots": [-1, -1]}
    yield "many tokens", {"slots": torch.randperm(512).tolist(), "num_blocks": 128, "head_dim": 64, "v_head_dim": 64}


def build(
    slots,
    *,
    num_blocks=6,
    block_size=4,
    num_kv_heads=2,
    head_dim=16,
    v_head_dim=8,
    layout="hnd",
    dtype=torch.float32,
    device="cpu",
):
    def rows(dim):
        # A side of a fused projection, its heads at another stride too.
        fused = (torch.randn(len(slots), 2 * num_kv_heads, 2 * dim) * 50).to(dtype)
        return fused.to(device)[:, ::2, :dim]

    def cache(dim, is_key):
        return to_device(nan_cache(layout, num_blocks, block_size, num_kv_heads, dim, dtype, is_key), device)

    return {
        "key": rows(head_dim),
        "value": rows(v_head_dim),
        "key_cache": cache(head_dim, True),
        "value_cache": cache(v_head_dim, False),
        "slot_mapping": torch.tensor(slots, dtype=torch.int64, device=device),
    }


def assert_matches_reference(arguments):
    copies = {name: to_device(arguments[name], arguments[name].device) for name in ("key_cache", "value_cache")}
    reference.reshape_and_cache(**(arguments | copies))
    others = {n: memory_of(t).clone() for n, t in arguments.items() if n not in copies}
    ops.reshape_and_cache(**arguments)
    for name, expected in copies.items():
        assert same_memory(arguments[name], expected)
    for name, expected in others.items():
        assert torch.equal(memory_of(arguments[name]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in samples()])
def test_matches_reference_and_touches_nothing_else(backend, sizes, dtype):
    torch.manual_seed(0)
    assert_matches_reference(build(**sizes, dtype=dtype, device=backend))


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("layout", ["hnd", "k_transposed"])
@pytest.mark.parametrize("scales", [(1, None), (None, 2), (2, 1)], ids=str)
def test_divides_by_scales(backend, scales, layout, dtype):
    torch.manual_seed(0)
    arguments = build([5, -1, 0, 17], layout=layout, dtype=dtype, device=backend)
    for name, size in zip(("key_scale", "value_scale"), scales, strict=True):
        if size:
            arguments[name] = (0.5 + torch.rand(size)).to(backend)
    assert_matches_reference(arguments)


LARGE = {"num_blocks": 512, "block_size": 16, "num_kv_heads": 5, "head_dim": 64, "v_head_dim": 56}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["hnd", "nhd", "pool_view", "k_transposed", "unaligned"])
def test_large_writes_match_reference(layout, dtype):
    """Writes of 2 MiB and more go past the caches of the CPU: rows of whole cache lines, and others."""
    torch.manual_seed(0)
    slots = torch.randperm(8192)[:8000]
    slots[::50] = -1
    assert_matches_reference(build(slots.tolist(), **LARGE, layout=layout, dtype=dtype))


def test_large_writes_with_scales_match_reference():
    torch.manual_seed(0)
    arguments = build(torch.randperm(8192)[:8000].tolist(), **LARGE)
    assert_matches_reference(arguments | {"key_scale": 0.5 + torch.rand(5), "value_scale": torch.tensor([0.3])})


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_share_the_tokens(num_threads):
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        slots = torch.randperm(4096)[:3000].tolist()
        assert_matches_reference(build(slots, num_blocks=64, block_size=64, head_dim=64, v_head_dim=64))
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    arguments = build([3, -1, 8])
    for scale in (None, torch.ones(1)):
        torch.library.opcheck(torch.ops.paged.reshape_and_cache.default, (*arguments.values(), scale, scale))


BAD_STRUCTURE = {
    "key 2-D": (lambda a: {"key": a["key"].flatten(1)}, "key: shape ["),
    "key tokens": (lambda a: {"key": torch.ones(9, 2, 16)}, "key: size 9 in dimension 0; must be"),
    "key heads": (
        lambda a: {"key": a["key"][:, :1]},
        "key: size 1 in dimension 1; must be 2 (num_kv_heads of the cache)",
    ),
    "key head_dim": (
        lambda a: {"key": a["key"][:, :, :8]},
        "key: size 8 in dimension 2; must be 16 (head_dim of the cache)",
    ),
    "key dtype": (lambda a: {"key": a["key"].double()}, "key: float64; must be float32, like key_cache"),
    "value dtype": (lambda a: {"value": a["value"].half()}, "value: float16; must be float32, like value_cache"),
    "value head_dim": (lambda a: {"value": a["key"]}, "value: size 16 in dimension 2; must be 8"),
    "value_cache dtype": (
        lambda a: {"value_cache": a["value_cache"].bfloat16()},
        "value_cache: bfloat16; must be float32, like key_cache",
    ),
    "key_cache 3-D": (lambda a: {"key_cache": a["key_cache"][0]}, "key_cache: shape [4, 2, 16]; must be 4-D"),
    "key_cache strides": (lambda a: {"key_cache": torch.ones(6, 4, 2, 32)[..., ::2]}, "key_cache: strides ["),
    "key_cache expanded": (
        lambda a: {"key_cache": torch.ones(1, 4, 2, 16).expand(6, -1, -1, -1)},
        "key_cache: expanded, strides [0, 32, 16, 1]; must be free of overlapping elements",
    ),
    "value_cache expanded": (
        lambda a: {"value_cache": torch.ones(6, 4, 1, 8).expand(-1, -1, 2, -1)},
        "value_cache: expanded, strides [32, 8, 0, 1]; must be free of overlapping elements",
    ),
    "block_size 3": (
        lambda a: {"key_cache": a["key_cache"][:, :3], "value_cache": a["value_cache"][:, :3]},
        "key_cache: block_size 3; must be a power of two from 1 to 256",
    ),
    "slot_mapping int32": (lambda a: {"slot_mapping": a["slot_mapping"].int()}, "slot_mapping: int32; must be int64"),
    "slot_mapping 2-D": (lambda a: {"slot_mapping": a["slot_mapping"][None]}, "slot_mapping: shape [1, "),
    "key_scale size": (lambda a: {"key_scale": torch.ones(3)}, "key_scale: shape [3]; must be [1] or [2]"),
    "value_scale dtype": (lambda a: {"value_scale": torch.ones(1).double()}, "value_scale: float64; must be float32"),
    "scaled integers": (
        lambda a: (
            {n: a[n].to(torch.int8) for n in ("key", "value", "key_cache", "value_cache")}
            | {"key_scale": torch.ones(1)}
        ),
        "key_cache: int8; must be float32 or bfloat16",
    ),
}
BAD_VALUES = {
    "key strides": (lambda a: {"key": torch.ones(2, 2, 32)[..., ::2]}, "key: strides [64, 32, 2]; must be contiguous"),
    "slot_mapping strides": (
        lambda a: {"slot_mapping": torch.ones(4).long()[::2]},
        "slot_mapping: strides [2]; must be contiguous",
    ),
    "slot below -1": (lambda a: {"slot_mapping": torch.tensor([3, -2])}, "slot_mapping: value -2 at [1]; must be in"),
    "slot too large": (
        lambda a: {"slot_mapping": torch.tensor([24, 0])},
        "slot_mapping: value 24 at [0]; must be in [-1, 24) (num_blocks * block_size)",
    ),
    "slot beyond int32": (lambda a: {"slot_mapping": torch.tensor([2**32, 0])}, "slot_mapping: value 4294967296 at"),
    "slot twice": (
        lambda a: {"slot_mapping": torch.tensor([5, 5])},
        "slot_mapping: value 5 at [1] and before; must be no slot twice",
    ),
    "no block": (
        lambda a: {n: a[n][:0] for n in ("key_cache", "value_cache")},
        "slot_mapping: value 3 at [0]; must be in [-1, 0)",
    ),
    "key_scale 0": (lambda a: {"key_scale": torch.zeros(1)}, "key_scale: value 0 at [0]; must be finite and not 0"),
    "value_scale NaN": (lambda a: {"value_scale": torch.tensor([1, torch.nan])}, "value_scale: value nan at [1]; must"),
}


@pytest.mark.parametrize("slots", [[3, 1], []], ids=str)
@pytest.mark.parametrize(("change", "message"), BAD_STRUCTURE.values(), ids=BAD_STRUCTURE)
def test_rejects_structure(change, message, slots):
    arguments = build(slots)
    assert_rejects("reshape_and_cache", arguments | change(arguments), message)


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_rejects_values_and_writes_nothing(change, message):
    arguments = build([3, 1])
    assert_rejects("reshape_and_cache", arguments | change(arguments), message)
    assert arguments["key_cache"].isnan().all() and arguments["value_cache"].isnan().all()


@pytest.mark.parametrize("name", ["key", "value", "value_cache", "slot_mapping"])
def test_rejects_another_device(name):
    arguments = build([3, 1])
    assert_rejects("reshape_and_cache", arguments | {name: arguments[name].to("meta")}, f"{name}: on meta; must be on ")
