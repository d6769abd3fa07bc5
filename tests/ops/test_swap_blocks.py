"""swap_blocks against the oracle, bit for bit."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_rejects
from tests.paged_batch import memory_of, nan_cache, same_memory, to_device
from torch_paged import ops

OP = "swap_blocks"

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]
# Where source and destination are; on a GPU from and to it, and within it.
SIDES = {
    "cpu": [("cpu", "cpu")],
    "cuda": [("cuda", "pinned"), ("pinned", "cuda"), ("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")],
}


def samples():
    """Every layout into every other, pools of different sizes, one layer and many, nothing to do."""
    for src_layout in ("hnd", "nhd", "pool_view", "k_transposed"):
        for dst_layout in ("hnd", "nhd", "pool_view", "k_transposed"):
            yield f"{src_layout} to {dst_layout}", {"src_layout": src_layout, "dst_layout": dst_layout}
    yield "same ids", {"pairs": [(1, 1), (0, 2), (2, 0)]}
    yield "many layers", {"pairs": [(5, 0), (1, 2)], "num_layers": 4}
    yield "odd sizes", {"pairs": [(5, 0)], "sizes": (2, 1, 5)}
    yield "big blocks", {"pairs": [(5, 0), (1, 2)], "sizes": (64, 4, 128)}
    yield "big blocks in pieces", {"pairs": [(5, 0), (1, 2)], "sizes": (64, 4, 128), "dst_layout": "nhd"}
    yield "many big blocks", {"pairs": [(0, 1), (5, 0), (1, 2)], "sizes": (256, 8, 128)}
    yield "no pair", {"pairs": []}
    yield "no layer", {"num_layers": 0}


def build(
    pairs=((4, 0), (1, 2)),
    *,
    num_layers=1,
    src_layout="hnd",
    dst_layout="hnd",
    sizes=(4, 2, 8),
    dtype=torch.float32,
):
    def caches(layout, num_blocks):
        made = [nan_cache(layout, num_blocks, *sizes, dtype, is_key=True) for _ in range(num_layers)]
        for cache in made:
            cache.copy_(torch.randint(-100, 100, cache.shape))
        return made

    return {
        "src": caches(src_layout, 6),
        "dst": caches(dst_layout, 3),
        "block_mapping": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
    }


def put(cache, place):
    """A copy in another place: on a device, or in pinned memory of the host."""
    if place != "pinned":
        return to_device(cache, place)
    memory = memory_of(cache).pin_memory().view(cache.dtype)
    return memory.as_strided(cache.shape, cache.stride(), cache.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=name) for name, sample in samples()])
def test_matches_reference_and_touches_nothing_else(backend, sample, dtype):
    torch.manual_seed(0)
    arguments = build(**sample, dtype=dtype)
    src, dst, mapping = arguments.values()
    expected = [to_device(cache, "cpu") for cache in dst]
    reference.swap_blocks(src, expected, mapping)
    for src_place, dst_place in SIDES[backend]:
        sources, results = [put(cache, src_place) for cache in src], [put(cache, dst_place) for cache in dst]
        ops.swap_blocks(sources, results, mapping)
        # Where a side is the host's, at once: nothing here waits for the GPU.
        for caches, same in ((results, expected), (sources, src)):
            assert all(same_memory(put(cache, "cpu"), copy) for cache, copy in zip(caches, same, strict=True))


def test_within_one_pool():
    cache = build()["src"][0]
    expected = to_device(cache, "cpu")
    reference.copy_blocks([expected], [], torch.tensor([[0, 5]]))
    ops.swap_blocks([cache], [cache], torch.tensor([[0, 5]]))
    assert same_memory(cache, expected)
    message = "block_mapping: source 5 at [1, 0] is a destination too; must be no block on both sides"
    assert_rejects(
        "swap_blocks", {"src": [cache], "dst": [cache], "block_mapping": torch.tensor([[0, 5], [5, 1]])}, message
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.paged.swap_blocks.default, tuple(build(num_layers=2).values()))


BAD = {
    "block_mapping int32": (
        lambda a: {"block_mapping": a["block_mapping"].int()},
        "block_mapping: int32; must be int64",
    ),
    "block_mapping 3-D": (lambda a: {"block_mapping": a["block_mapping"][None]}, "block_mapping: shape [1, "),
    "block_mapping columns": (
        lambda a: {"block_mapping": a["block_mapping"][:, :1].contiguous()},
        "block_mapping: size 1 in dimension 1; must be 2 (source, destination)",
    ),
    "layers": (lambda a: {"dst": a["dst"][:1]}, "dst: 1 tensors; must be 2, like src"),
    "src 3-D": (lambda a: {"src": [a["src"][0], a["src"][1][0]]}, "src[1]: shape [4, 2, 8]; must be 4-D"),
    "dst 3-D": (lambda a: {"dst": [a["dst"][0][0], a["dst"][1]]}, "dst[0]: shape [4, 2, 8]; must be 4-D"),
    "dtype": (lambda a: {"dst": [a["dst"][0], a["dst"][1].half()]}, "dst[1]: float16; must be float32, like src[1]"),
    "block_size": (
        lambda a: {"dst": [cache[:, :2] for cache in a["dst"]]},
        "dst[0]: size 2 in dimension 1; must be 4 (block_size of src)",
    ),
    "heads": (
        lambda a: {"dst": [cache[:, :, :1] for cache in a["dst"]]},
        "dst[0]: size 1 in dimension 2; must be 2 (num_kv_heads of src)",
    ),
    "head_dim": (
        lambda a: {"dst": [cache[..., :4] for cache in a["dst"]]},
        "dst[0]: size 4 in dimension 3; must be 8 (head_dim of src)",
    ),
    "expanded": (
        lambda a: {"dst": [a["dst"][0], torch.ones(1, 4, 2, 8).expand(3, -1, -1, -1)]},
        "dst[1]: expanded, strides [0, 16, 8, 1]; must be free of overlapping elements",
    ),
    "src on meta": (lambda a: {"src": [a["src"][0].to("meta"), a["src"][1]]}, "src[0]: on meta; must be on cpu"),
    "dst on meta": (lambda a: {"dst": [a["dst"][0], a["dst"][1].to("meta")]}, "dst[1]: on meta; must be on cpu"),
}
BAD_VALUES = {
    "source negative": ([(-1, 2)], "block_mapping: value -1 at [0, 0]; must be in [0, 6) (num_blocks)"),
    "source too large": ([(1, 2), (6, 0)], "block_mapping: value 6 at [1, 0]; must be in [0, 6)"),
    "destination too large": ([(4, 3)], "block_mapping: value 3 at [0, 1]; must be in [0, 3)"),
    "destination beyond int32": ([(1, 2**32)], "block_mapping: value 4294967296 at [0, 1]; must be in [0, 3)"),
    "destination twice": (
        [(1, 2), (4, 2)],
        "block_mapping: destination 2 at [1, 1] and before; must be no destination twice",
    ),
}


@pytest.mark.parametrize("pairs", [[(1, 2)], []], ids=str)
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects_structure(change, message, pairs):
    arguments = build(pairs, num_layers=2)
    assert_rejects("swap_blocks", arguments | change(arguments), message)


@pytest.mark.parametrize(("pairs", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_rejects_values_and_writes_nothing(pairs, message):
    arguments = build(pairs)
    before = memory_of(arguments["dst"][0]).clone()
    assert_rejects("swap_blocks", arguments, message)
    assert torch.equal(memory_of(arguments["dst"][0]), before)
