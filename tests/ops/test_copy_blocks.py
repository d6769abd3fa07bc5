"""copy_blocks against the oracle, bit for bit."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_rejects
from tests.paged_batch import memory_of, same_memory, to_device
from torch_paged import ops

OP = "copy_blocks"

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def samples():
    """One layer and many and more, strided pools, one source for several blocks, nothing to do."""
    yield "one pair", {"pairs": [(1, 3)]}
    yield "many layers", {"pairs": [(0, 5), (1, 2)], "num_layers": 5}
    yield "more layers than a launch takes", {"pairs": [(0, 5)], "num_layers": 230, "sizes": (2, 1, 4)}
    yield "one source", {"pairs": [(4, 0), (4, 1), (4, 3)], "num_layers": 2}
    for layout in ("nhd", "pool_view", "k_transposed"):
        yield layout, {"pairs": [(5, 0), (2, 3)], "layout": layout, "num_layers": 2}
    yield "odd sizes", {"pairs": [(5, 0)], "sizes": (3, 1, 5)}
    yield "blocks of nothing", {"pairs": [(5, 0)], "sizes": (4, 0, 8)}
    yield "no pair", {"pairs": []}
    yield "no layer", {"pairs": [(1, 3)], "num_layers": 0}
    yield "large blocks", {"pairs": [(0, 1), (2, 3)], "sizes": (64, 4, 64), "num_layers": 3}


def random_cache(layout, num_blocks, sizes, dtype, is_key=True):
    block_size, num_kv_heads, head_dim = sizes
    physical = {
        "hnd": ((num_kv_heads, block_size, head_dim), (0, 2, 1, 3)),
        "nhd": ((block_size, num_kv_heads, head_dim), (0, 1, 2, 3)),
        "k_transposed": ((num_kv_heads, head_dim, block_size), (0, 3, 1, 2)),
        "pool_view": ((num_kv_heads, block_size, head_dim + 3), (0, 2, 1, 3)),
    }
    shape, order = physical["hnd" if layout == "k_transposed" and not is_key else layout]
    # Twice the blocks, of which every second is another's.
    pool = torch.randint(-100, 100, (num_blocks, 2, *shape)).to(dtype)
    return pool[:, 0].permute(order)[..., :head_dim]


def build(pairs, *, num_layers=1, layout="hnd", sizes=(4, 2, 8), dtype=torch.float32, device="cpu"):
    def caches(sizes, is_key):
        made = [random_cache(layout, 6, sizes, dtype, is_key) for _ in range(num_layers)]
        return [to_device(cache, device) for cache in made]

    return {
        "key_caches": caches(sizes, True),
        "value_caches": caches((*sizes[:2], 3), False),
        "block_mapping": torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=name) for name, sample in samples()])
def test_matches_reference_and_touches_nothing_else(backend, sample, dtype):
    torch.manual_seed(0)
    arguments = build(**sample, dtype=dtype, device=backend)
    copies = {n: [to_device(c, backend) for c in arguments[n]] for n in ("key_caches", "value_caches")}
    reference.copy_blocks(**(arguments | copies))
    mapping = arguments["block_mapping"].clone()
    ops.copy_blocks(**arguments)
    for name, expected in copies.items():
        assert all(same_memory(cache, copy) for cache, copy in zip(arguments[name], expected, strict=True))
    assert torch.equal(arguments["block_mapping"], mapping)


@pytest.mark.parametrize("sizes", [(16, 4, 64), (16, 3, 5)], ids=str)
@pytest.mark.parametrize("layout", ["hnd", "nhd", "pool_view"])
def test_large_copies_match_reference(layout, sizes):
    """Copies of 2 MiB and more go past the caches of the CPU: runs of whole cache lines, and others."""
    torch.manual_seed(0)
    num_pairs = (2 << 20) // (4 * sizes[0] * sizes[1] * sizes[2]) + 1
    caches = [random_cache(layout, 2 * num_pairs, sizes, torch.float32) for _ in range(2)]
    expected = [to_device(cache, "cpu") for cache in caches]
    mapping = torch.randperm(2 * num_pairs).view(-1, 2)
    reference.copy_blocks(expected[:1], expected[1:], mapping)
    ops.copy_blocks(caches[:1], caches[1:], mapping)
    assert all(same_memory(cache, copy) for cache, copy in zip(caches, expected, strict=True))


def test_layers_may_differ(backend):
    torch.manual_seed(0)
    caches = [to_device(random_cache("nhd", 6, sizes, torch.float16), backend) for sizes in ((4, 2, 8), (16, 1, 3))]
    expected = [to_device(cache, backend) for cache in caches]
    mapping = torch.tensor([[2, 4], [1, 0]], device=backend)
    reference.copy_blocks(expected[:1], expected[1:], mapping)
    ops.copy_blocks(caches[:1], caches[1:], mapping)
    assert all(same_memory(cache, copy) for cache, copy in zip(caches, expected, strict=True))


def test_opcheck():
    for sample in ({"pairs": [(1, 3)], "num_layers": 2}, {"pairs": [], "layout": "k_transposed"}):
        torch.library.opcheck(torch.ops.paged.copy_blocks.default, tuple(build(**sample).values()))


BAD = {
    "block_mapping int32": (
        lambda a: {"block_mapping": a["block_mapping"].int()},
        "block_mapping: int32; must be int64",
    ),
    "block_mapping 1-D": (lambda a: {"block_mapping": a["block_mapping"].flatten()}, "block_mapping: shape ["),
    "block_mapping columns": (
        lambda a: {"block_mapping": torch.zeros(a["block_mapping"].shape[0], 3).long()},
        "block_mapping: size 3 in dimension 1; must be 2 (source, destination)",
    ),
    "layers": (lambda a: {"value_caches": a["value_caches"][:1]}, "value_caches: 1 layers; must be 2, like key_caches"),
    "cache 3-D": (lambda a: {"key_caches": [a["key_caches"][0][0]] * 2}, "key_caches[0]: shape [4, 2, 8]; must be 4-D"),
    "cache expanded": (
        lambda a: {"value_caches": [a["value_caches"][0], torch.ones(1, 4, 2, 3).expand(6, -1, -1, -1)]},
        "value_caches[1]: expanded, strides [0, 6, 3, 1]; must be free of overlapping elements",
    ),
    "cache on meta": (
        lambda a: {"key_caches": [a["key_caches"][0], a["key_caches"][1].to("meta")]},
        "key_caches[1]: on meta; must be on cpu",
    ),
}
BAD_VALUES = {
    "source negative": ([(-1, 2)], "block_mapping: value -1 at [0, 0]; must be in [0, 6) (num_blocks)"),
    "source too large": ([(1, 2), (6, 3)], "block_mapping: value 6 at [1, 0]; must be in [0, 6)"),
    "destination negative": ([(1, -1)], "block_mapping: value -1 at [0, 1]; must be in [0, 6)"),
    "destination beyond int32": ([(1, 2**32)], "block_mapping: value 4294967296 at [0, 1]; must be in [0, 6)"),
    "destination twice": (
        [(1, 3), (2, 3)],
        "block_mapping: destination 3 at [1, 1] and before; must be no destination twice",
    ),
    "destination is a source": (
        [(1, 3), (3, 2)],
        "block_mapping: source 3 at [1, 0] is a destination too; must be no block on both sides",
    ),
    "onto itself": ([(1, 1)], "block_mapping: source 1 at [0, 0] is a destination too; must be no block on both sides"),
}


@pytest.mark.parametrize("pairs", [[(1, 2)], []], ids=str)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects_structure(change, message, pairs):
    arguments = build(pairs, num_layers=2)
    assert_rejects("copy_blocks", arguments | change(arguments), message)


@pytest.mark.parametrize(("pairs", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_rejects_values_and_writes_nothing(pairs, message):
    arguments = build(pairs)
    before = [memory_of(cache).clone() for cache in (*arguments["key_caches"], *arguments["value_caches"])]
    assert_rejects("copy_blocks", arguments, message)
    after = [memory_of(cache) for cache in (*arguments["key_caches"], *arguments["value_caches"])]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_rejects_strided_mapping():
    arguments = build([(1, 2)]) | {"block_mapping": torch.zeros(2, 4).long()[:, ::2]}
    assert_rejects("copy_blocks", arguments, "block_mapping: strides [4, 2]; must be contiguous")
