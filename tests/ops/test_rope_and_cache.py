"""rope_and_cache against the oracle, bit for bit in float32 steps, and against the rotations of transformers."""

from importlib import import_module

import pytest
import torch

from tests import reference
from tests.assertions import assert_as_exact_as_torch, assert_rejects
from tests.paged_batch import memory_of, nan_cache, same_memory, to_device
from torch_paged import ops

OP = "rope_and_cache"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CACHES = ("key_cache", "value_cache")


def samples():
    """Layouts, rotary dims around the widths of vectors, slots that skip and jump, one token and many."""
    some = [7, -1, 3, 12, -1, 0, 21]
    yield "hnd", {"slots": some}
    yield "nhd", {"slots": some, "layout": "nhd"}
    yield "pool_view", {"slots": some, "layout": "pool_view"}
    yield "k_transposed", {"slots": some, "layout": "k_transposed"}
    yield "unaligned", {"slots": some, "layout": "unaligned"}
    yield "k_transposed, partial", {"slots": some, "layout": "k_transposed", "head_dim": 48, "rotary_dim": 12}
    yield "whole vectors", {"slots": some, "head_dim": 128, "v_head_dim": 128}
    yield "vectors and a rest", {"slots": some, "head_dim": 96}
    yield "partial", {"slots": some, "head_dim": 80, "rotary_dim": 32}
    yield "small and partial", {"slots": some, "head_dim": 64, "rotary_dim": 16}
    yield "odd sizes", {"slots": some, "head_dim": 13, "rotary_dim": 6, "v_head_dim": 3, "num_heads": 3}
    yield "one pair", {"slots": some, "head_dim": 2, "num_kv_heads": 1, "num_heads": 1}
    yield "the most", {"slots": some, "head_dim": 520, "rotary_dim": 512}
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
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    v_head_dim=8,
    rotary_dim=None,
    layout="hnd",
    dtype=torch.float32,
    angle_dtype=None,
    device="cpu",
):
    def rows(heads, dim):
        # A side of a fused projection, its heads at another stride too.
        fused = (torch.randn(len(slots), 2 * heads, 2 * dim) * 5).to(dtype)
        return fused.to(device)[:, ::2, :dim]

    def angles():
        # Columns of a wider table, and no two alike: each element is turned by its own.
        size = rotary_dim or head_dim
        return torch.randn(len(slots), size + 3).to(angle_dtype or dtype).to(device)[:, :size]

    def cache(dim, is_key):
        return to_device(nan_cache(layout, num_blocks, block_size, num_kv_heads, dim, dtype, is_key), device)

    return {
        "query": rows(num_heads, head_dim),
        "key": rows(num_kv_heads, head_dim),
        "value": rows(num_kv_heads, v_head_dim),
        "cos": angles(),
        "sin": angles(),
        "key_cache": cache(head_dim, True),
        "value_cache": cache(v_head_dim, False),
        "slot_mapping": torch.tensor(slots, dtype=torch.int64, device=device),
    }


def assert_matches_reference(arguments, interleaved=False):
    """All bits, with each step in float32, or float64 for float64: of the query, of both caches and between them."""
    dtype = arguments["query"].dtype
    step = torch.promote_types(dtype, torch.float32)
    copies = {name: to_device(arguments[name], arguments[name].device) for name in CACHES}
    expected = reference.rope_and_cache(**(arguments | copies), interleaved=interleaved, dtype=step).to(dtype)
    others = {name: memory_of(tensor).clone() for name, tensor in arguments.items() if name not in copies}
    out = ops.rope_and_cache(**arguments, interleaved=interleaved)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, expected)
    for name, cache in copies.items():
        assert same_memory(arguments[name], cache), name
    for name, memory in others.items():
        assert torch.equal(memory_of(arguments[name]), memory), name


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in samples()])
def test_matches_reference_and_touches_nothing_else(backend, sizes, dtype, interleaved):
    torch.manual_seed(0)
    for angle_dtype in {dtype, torch.float32}:
        arguments = build(**sizes, dtype=dtype, angle_dtype=angle_dtype, device=backend)
        assert_matches_reference(arguments, interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, interleaved):
    torch.manual_seed(0)
    slots = torch.randperm(256)[:200].tolist()
    arguments = build(slots, num_blocks=64, head_dim=80, rotary_dim=48, dtype=dtype, device=backend)
    results = {}
    for step in (torch.float64, dtype):
        copies = {name: arguments[name].to(step) for name in CACHES}
        query = reference.rope_and_cache(**(arguments | copies), interleaved=interleaved, dtype=step)
        results[step] = query, copies["key_cache"].flatten(0, 1)[slots]
    out = ops.rope_and_cache(**arguments, interleaved=interleaved)
    stored = arguments["key_cache"].flatten(0, 1)[slots]
    for result, exact, same_dtype in zip((out, stored), results[torch.float64], results[dtype], strict=True):
        assert_as_exact_as_torch(result, exact, same_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["hnd", "k_transposed"])
@pytest.mark.parametrize("scales", [(1, None), (None, 2), (2, 1)], ids=str)
def test_matches_with_scales(backend, scales, layout, dtype):
    torch.manual_seed(0)
    arguments = build([5, -1, 0, 17], head_dim=40, rotary_dim=24, layout=layout, dtype=dtype, device=backend)
    for name, size in zip(("key_scale", "value_scale"), scales, strict=True):
        if size:
            arguments[name] = (0.5 + torch.rand(size)).to(backend)
    for interleaved in (False, True):
        assert_matches_reference(arguments, interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_what_reshape_and_cache_stores_of_the_rotated_key(backend, dtype):
    arguments = build([5, -1, 0, 17], head_dim=40, rotary_dim=24, dtype=dtype, device=backend)
    copies = [to_device(arguments[name], backend) for name in CACHES]
    step = torch.promote_types(dtype, torch.float32)
    angles = (arguments[name].to(step)[:, None] for name in ("cos", "sin"))
    key = reference.rotated(arguments["key"].to(step), *angles, interleaved=False).to(dtype)
    ops.reshape_and_cache(key, arguments["value"], *copies, arguments["slot_mapping"])
    ops.rope_and_cache(**arguments)
    for name, cache in zip(CACHES, copies, strict=True):
        assert same_memory(arguments[name], cache), name


# Family, the size of its heads and how much of one it rotates, and its pairs.
FAMILIES = {
    "llama": (64, 64, False),
    "cohere": (64, 64, True),
    "phi": (80, 32, False),
    "stablelm": (64, 16, False),
    "gptj": (64, 16, True),
}


def rotation_of(family, head_dim, rotary_dim, positions, dtype):
    """Return transformers' own rotation of `[tokens, heads, head_dim]`, and the cos and sin it multiplies by."""
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    if family == "gptj":
        table = modeling.create_sinusoidal_positions(512, rotary_dim)[positions].to(dtype)
        sin, cos = table.chunk(2, -1)

        def rotate(rows):
            return modeling.apply_rotary_pos_emb(rows[None], sin[None], cos[None])[0]

        return rotate, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)

    config_class = modeling.__dict__[{"stablelm": "StableLm"}.get(family, family.capitalize()) + "Config"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_dim / head_dim}
    config = config_class(hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope)
    embedding_class = next(value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))
    cos, sin = embedding_class(config)(torch.empty(0, dtype=dtype), positions[None])

    def rotate(rows):
        turned, _ = modeling.apply_rotary_pos_emb(rows[None], rows[None], cos, sin, unsqueeze_dim=2)
        return turned[0]

    return rotate, cos[0], sin[0]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotates_like_transformers(family, dtype):
    torch.manual_seed(0)
    head_dim, rotary_dim, interleaved = FAMILIES[family]
    positions = torch.randint(512, (50,))
    slots = torch.randperm(64)[:50].tolist()
    rotate, cos, sin = rotation_of(family, head_dim, rotary_dim, positions, dtype)
    assert cos.shape == (50, rotary_dim) and cos.dtype == dtype
    arguments = build(slots, num_blocks=16, head_dim=head_dim, dtype=dtype) | {"cos": cos, "sin": sin}
    out = ops.rope_and_cache(**arguments, interleaved=interleaved)
    stored = arguments["key_cache"].flatten(0, 1)[slots]
    exact_angles = cos.double()[:, None], sin.double()[:, None]
    for rows, result in ((arguments["query"], out), (arguments["key"], stored)):
        expected = torch.cat((rotate(rows[..., :rotary_dim]), rows[..., rotary_dim:]), -1)
        exact = reference.rotated(rows.double(), *exact_angles, interleaved)
        assert_as_exact_as_torch(result, exact, expected)
        # In bfloat16 most families round each product; Cohere rotates in float32, as we do.
        if dtype == torch.float32 or family == "cohere":
            assert torch.equal(result, expected)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_share_the_tokens(num_threads):
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        slots = torch.randperm(4096)[:3000].tolist()
        assert_matches_reference(build(slots, num_blocks=64, block_size=64, head_dim=64, v_head_dim=64))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(angle_dtype):
    arguments = tuple(build([3, -1, 8], dtype=torch.bfloat16, angle_dtype=angle_dtype).values())
    for interleaved, scale in ((False, None), (True, torch.ones(1))):
        options = {"interleaved": interleaved, "key_scale": scale, "value_scale": scale}
        torch.library.opcheck(torch.ops.paged.rope_and_cache.default, arguments, options)


BAD_STRUCTURE = {
    "query 2-D": (lambda a: {"query": a["query"].flatten(1)}, "query: shape ["),
    "query tokens": (lambda a: {"query": torch.ones(9, 4, 16)}, "query: size 9 in dimension 0; must be"),
    "query head_dim": (
        lambda a: {"query": a["query"][:, :, :8]},
        "query: size 8 in dimension 2; must be 16 (head_dim of the cache)",
    ),
    "query dtype": (lambda a: {"query": a["query"].half()}, "query: float16; must be float32, like key_cache"),
    "key heads": (lambda a: {"key": a["key"][:, :1]}, "key: size 1 in dimension 1; must be 2"),
    "value head_dim": (lambda a: {"value": a["key"]}, "value: size 16 in dimension 2; must be 8"),
    "key_cache 3-D": (lambda a: {"key_cache": a["key_cache"][0]}, "key_cache: shape [4, 2, 16]; must be 4-D"),
    "value_cache dtype": (
        lambda a: {"value_cache": a["value_cache"].bfloat16()},
        "value_cache: bfloat16; must be float32, like key_cache",
    ),
    "integers": (
        lambda a: {name: a[name].to(torch.int8) for name in ("query", "key", "value", *CACHES)},
        "key_cache: int8; must be float32 or bfloat16",
    ),
    "slot_mapping int32": (lambda a: {"slot_mapping": a["slot_mapping"].int()}, "slot_mapping: int32; must be int64"),
    "cos 3-D": (lambda a: {"cos": a["cos"][:, None]}, "cos: shape ["),
    "cos tokens": (lambda a: {"cos": torch.ones(9, 16)}, "cos: size 9 in dimension 0; must be"),
    "cos odd": (
        lambda a: {"cos": a["cos"][:, :7]},
        "cos: rotary_dim 7; must be even and from 2 to 16 (head_dim of the cache)",
    ),
    "cos empty": (lambda a: {"cos": a["cos"][:, :0]}, "cos: rotary_dim 0; must be even and from 2 to 16"),
    "cos wide": (
        lambda a: {"cos": torch.ones(len(a["cos"]), 18)},
        "cos: rotary_dim 18; must be even and from 2 to 16",
    ),
    "cos float16": (lambda a: {"cos": a["cos"].half()}, "cos: float16; must be float32"),
    "cos float64": (lambda a: {"cos": a["cos"].double()}, "cos: float64; must be float32"),
    "cos other half": (
        lambda a: {name: a[name].bfloat16() for name in ("query", "key", "value", *CACHES)} | {"cos": a["cos"].half()},
        "cos: float16; must be bfloat16 or float32",
    ),
    "sin dtype": (
        lambda a: {name: a[name].bfloat16() for name in ("query", "key", "value", *CACHES, "sin")},
        "sin: bfloat16; must be float32, like cos",
    ),
    "sin 1-D": (lambda a: {"sin": a["sin"].flatten()}, "sin: shape ["),
    "sin tokens": (lambda a: {"sin": torch.ones(9, 16)}, "sin: size 9 in dimension 0; must be"),
    "sin rotary_dim": (
        lambda a: {"sin": a["sin"][:, :8]},
        "sin: size 8 in dimension 1; must be 16 (rotary_dim of cos)",
    ),
    "key_scale size": (lambda a: {"key_scale": torch.ones(3)}, "key_scale: shape [3]; must be [1] or [2]"),
    "value_scale dtype": (lambda a: {"value_scale": torch.ones(1).double()}, "value_scale: float64; must be float32"),
}
BAD_VALUES = {
    "query strides": (
        lambda a: {"query": torch.ones(2, 4, 32)[..., ::2]},
        "query: strides [128, 32, 2]; must be contiguous in the last dimension",
    ),
    "cos strides": (lambda a: {"cos": torch.ones(2, 32)[:, ::2]}, "cos: strides [32, 2]; must be contiguous in the"),
    "sin strides": (lambda a: {"sin": torch.ones(2, 32)[:, ::2]}, "sin: strides [32, 2]; must be contiguous in the"),
    "slot too large": (
        lambda a: {"slot_mapping": torch.tensor([24, 0])},
        "slot_mapping: value 24 at [0]; must be in [-1, 24) (num_blocks * block_size)",
    ),
    "slot twice": (
        lambda a: {"slot_mapping": torch.tensor([5, 5])},
        "slot_mapping: value 5 at [1] and before; must be no slot twice",
    ),
    "key_scale 0": (lambda a: {"key_scale": torch.zeros(1)}, "key_scale: value 0 at [0]; must be finite and not 0"),
    "value_scale NaN": (lambda a: {"value_scale": torch.tensor([1, torch.nan])}, "value_scale: value nan at [1]; must"),
}


@pytest.mark.parametrize("slots", [[3, 1], []], ids=str)
@pytest.mark.parametrize(("change", "message"), BAD_STRUCTURE.values(), ids=BAD_STRUCTURE)
def test_rejects_structure(change, message, slots):
    arguments = build(slots)
    assert_rejects("rope_and_cache", arguments | change(arguments), message)


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_rejects_values_and_writes_nothing(change, message):
    arguments = build([3, 1])
    assert_rejects("rope_and_cache", arguments | change(arguments), message)
    assert arguments["key_cache"].isnan().all() and arguments["value_cache"].isnan().all()


def test_rejects_more_than_512_rotated_elements():
    message = "cos: rotary_dim 514; must be at most 512"
    assert_rejects("rope_and_cache", build([3, 1], head_dim=514), message)


@pytest.mark.parametrize("name", ["query", "key", "value", "cos", "sin", "value_cache", "slot_mapping"])
def test_rejects_another_device(name):
    arguments = build([3, 1])
    assert_rejects("rope_and_cache", arguments | {name: arguments[name].to("meta")}, f"{name}: on meta; must be on ")
