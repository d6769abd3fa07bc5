"""attention and attention_with_lse against the float64 oracle."""

import pytest
import torch

from tests import reference
from tests.assertions import assert_as_exact_as_torch, largest_error
from tests.paged_batch import PagedBatch, memory_of, paged_batch
from torch_paged import ops

OP = "attention"

# (query rows, cached tokens): decode, prefill, chunked prefill, no rows, nothing at all, left padding.
MIXTURE = [(1, 37), (5, 5), (3, 40), (0, 9), (1, 1), (0, 0), (4, 2), (2, 0), (1, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the options' per-head tensors are made of; the oracle and the op get the same.
PER_HEAD = ("alibi_slopes", "sinks")


def samples():
    """Each head size, group, block size, layout and option on the mixture of rows; then several at once."""
    for head_dim in (8, 24, 64, 80, 128, 256, 512):
        yield f"head_dim {head_dim}", {"head_dim": head_dim}, {}
    for head_dim, v_head_dim in ((64, 24), (24, 128), (192, 128)):
        yield f"head_dim {head_dim} and {v_head_dim}", {"head_dim": head_dim, "v_head_dim": v_head_dim}, {}
    for num_heads, num_kv_heads in ((4, 4), (6, 1), (12, 4), (1, 1), (32, 2), (7, 1), (22, 11)):
        yield f"heads {num_heads} / {num_kv_heads}", {"num_heads": num_heads, "num_kv_heads": num_kv_heads}, {}
    for block_size in (1, 2, 4, 8, 32, 64, 128, 256):
        yield f"block_size {block_size}", {"block_size": block_size}, {}
    for layout in ("nhd", "pool_view", "k_transposed", "unaligned"):
        yield layout, {"layout": layout}, {}
    for name, options in {
        "bidirectional": {"causal": False},
        "scale": {"scale": 0.7},
        "softcap": {"softcap": 2.0, "scale": 1.0},
        "alibi": {"alibi_slopes": True},
        "alibi bidirectional": {"alibi_slopes": True, "causal": False},
        "sinks": {"sinks": True},
        "key_scale": {"key_scale": 1},
        "value_scale": {"value_scale": 1},
        "scales per head": {"key_scale": 2, "value_scale": 2},
        "max_seq_len": {"max_seq_len": 64},
    }.items():
        yield name, {}, options
    for window in (1, 2, 7, 16, 33, 1000):
        yield f"window {window}", {"block_size": 8}, {"sliding_window": window}
        yield f"window {window} bidirectional", {"block_size": 8}, {"sliding_window": window, "causal": False}
    for num_splits in (1, 2, 3, 64):
        yield f"num_splits {num_splits}", {"block_size": 4}, {"num_splits": num_splits}
    yield "deterministic", {}, {"deterministic": True}
    everything = {"softcap": 3.0, "alibi_slopes": True, "sinks": True, "key_scale": 2, "value_scale": 1}
    for layout in ("hnd", "k_transposed", "unaligned"):
        sizes = {"head_dim": 80, "v_head_dim": 40, "num_heads": 6, "block_size": 4, "layout": layout}
        yield f"everything {layout}", sizes, {**everything, "sliding_window": 19, "num_splits": 2}
        long = {"rows": [(1, 1000), (40, 200), (70, 70), (1, 3)], "layout": layout, "head_dim": 64, "num_heads": 8}
        yield f"long {layout}", long, {}
        yield f"long everything {layout}", {**long, "block_size": 32}, {**everything, "sliding_window": 90}
    yield "one long sequence", {"rows": [(1, 2049)], "head_dim": 128}, {}
    yield "one long sequence deterministic", {"rows": [(1, 2049)], "head_dim": 128}, {"deterministic": True}
    yield "decode", {"rows": [(1, 10 + 7 * s) for s in range(12)], "head_dim": 128, "num_heads": 8}, {}


def build(sizes, options, dtype, device="cpu") -> tuple[PagedBatch, dict]:
    sizes = {"rows": MIXTURE, **sizes}
    if window := options.get("sliding_window"):
        # What even a sequence's first row sees no more.
        sizes["freed_before"] = [max(0, max(0, n - q) - window + 1) for q, n in sizes["rows"]]
    batch = paged_batch(**sizes, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    options = dict(options)
    for name in PER_HEAD:
        if name in options:
            options[name] = torch.rand(batch.query.shape[1], generator=generator).to(device)
    for name in ("key_scale", "value_scale"):
        if name in options:
            options[name] = (0.5 + torch.rand(options[name], generator=generator)).to(device)
    return batch, options


def oracle(batch, options, dtype=torch.float64):
    arguments = {name: value for name, value in batch.arguments.items() if name != "max_query_len"}
    known = {n: v for n, v in options.items() if n not in ("num_splits", "deterministic", "max_seq_len")}
    return reference.attention(**arguments, **known, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "options"), [pytest.param(*rest, id=name) for name, *rest in samples()])
def test_matches_reference(backend, sizes, options, dtype):
    batch, options = build(sizes, options, dtype, backend)
    out, lse = ops.attention_with_lse(**batch.arguments, **options)
    exact_out, exact_lse = oracle(batch, options)
    same_dtype_out, _ = oracle(batch, options, dtype)
    _, float32_lse = oracle(batch, options, torch.float32)
    assert out.dtype == dtype and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert_as_exact_as_torch(out, exact_out, same_dtype_out)
    assert largest_error(lse, exact_lse) <= 2 * largest_error(float32_lse, exact_lse) + 1e-5
    torch.testing.assert_close(ops.attention(**batch.arguments, **options), out, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["hnd", "k_transposed"])
def test_touches_nothing_else(backend, layout):
    batch, options = build({"layout": layout}, {"sinks": True, "sliding_window": 5}, torch.bfloat16, backend)
    tensors = [t for t in (*batch.arguments.values(), *options.values()) if isinstance(t, torch.Tensor)]
    before = [memory_of(tensor).clone() for tensor in tensors]
    ops.attention_with_lse(**batch.arguments, **options)
    assert all(torch.equal(memory_of(tensor), old) for tensor, old in zip(tensors, before, strict=True))


def test_rows_that_see_nothing_give_zeros(backend):
    batch, _ = build({"rows": [(4, 2), (3, 0)]}, {}, torch.float32, backend)
    out, lse = ops.attention_with_lse(**batch.arguments)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=backend)
    out_with_sinks, lse_with_sinks = ops.attention_with_lse(**batch.arguments, sinks=sinks)
    for blind in (0, 1, 4, 5, 6):
        assert (out[blind] == 0).all() and (lse[:, blind] == -torch.inf).all()
        assert (out_with_sinks[blind] == 0).all() and torch.equal(lse_with_sinks[:, blind], sinks)
    assert (out[2:4] != 0).all()


@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 5), (0, 3)]], ids=str)
def test_without_query_rows(backend, rows):
    batch, _ = build({"rows": rows}, {}, torch.float32, backend)
    out, lse = ops.attention_with_lse(**batch.arguments)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"num_splits": 4}, {"num_heads": 40}], ids=str)
def test_deterministic_ignores_batch_and_threads(backend, options, dtype):
    rows = [(1, 700), (1, 33), (20, 90), (1, 2000), (0, 12), (64, 64)]
    options = dict(options)
    sizes = {"rows": rows, "head_dim": 64, "num_heads": options.pop("num_heads", 8)}
    batch, _ = build(sizes, {}, dtype, backend)
    options = {**options, "deterministic": True}
    whole, whole_lse = ops.attention_with_lse(**batch.arguments, **options)
    threads = torch.get_num_threads()
    for s in range(len(rows)):
        begin, end = batch.cu_seqlens_q[s : s + 2].tolist()
        alone = batch.arguments | {
            "query": batch.query[begin:end],
            "block_table": batch.block_table[s : s + 1],
            "seq_lens": batch.seq_lens[s : s + 1],
            "cu_seqlens_q": torch.tensor([0, end - begin], dtype=torch.int32, device=backend),
            "max_query_len": end - begin,
        }
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            try:
                out, lse = ops.attention_with_lse(**alone, **options)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(out, whole[begin:end]) and torch.equal(lse, whole_lse[:, begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_ignore_one_another(backend, dtype):
    """Heads that a kernel takes together, more of them than it takes at once, get what each gets alone."""
    num_kv_heads, group = 11, 2
    sizes = {"rows": [(1, 130), (3, 70), (0, 5), (1, 9)], "num_heads": num_kv_heads * group, "head_dim": 64}
    batch, options = build(
        sizes | {"num_kv_heads": num_kv_heads}, {"alibi_slopes": True, "key_scale": num_kv_heads}, dtype, backend
    )
    options["num_splits"] = 1
    whole, whole_lse = ops.attention_with_lse(**batch.arguments, **options)
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        alone = batch.arguments | {
            "query": batch.query[:, heads],
            "key_cache": batch.key_cache[:, :, kv_head : kv_head + 1],
            "value_cache": batch.value_cache[:, :, kv_head : kv_head + 1],
        }
        scales = {"alibi_slopes": options["alibi_slopes"][heads], "key_scale": options["key_scale"][kv_head, None]}
        out, lse = ops.attention_with_lse(**alone, **options | scales)
        assert torch.equal(out, whole[:, heads]) and torch.equal(lse, whole_lse[heads])


def test_large_scores_do_not_overflow(backend):
    batch, _ = build({"head_dim": 64}, {}, torch.float16, backend)
    out, lse = ops.attention_with_lse(**batch.arguments, scale=1000.0)
    exact_out, exact_lse = oracle(batch, {"scale": 1000.0})
    assert largest_error(out, exact_out) <= 1e-2
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_splits": 4}, {"sinks": True}, {"num_splits": 4, "sinks": True}], ids=str)
def test_nan_stays_nan(backend, options, dtype):
    """A query or a key that has overflowed is not to look like one that sees nothing."""
    batch, options = build({"rows": [(1, 300), (1, 70), (1, 5)], "head_dim": 64}, options, dtype, backend)
    batch.key_cache[batch.block_table[0, 0], 3] = torch.nan
    batch.query[1] = torch.inf
    out, lse = ops.attention_with_lse(**batch.arguments, **options)
    assert out[:2].isnan().all() and lse[:, :2].isnan().all()
    assert out[2].isfinite().all() and lse[:, 2].isfinite().all()


def test_cache_beyond_2_to_31_elements():
    """The last of 2^31 + elements; only the pages that are touched take memory."""
    block_size, num_kv_heads, head_dim = 16, 8, 128
    num_blocks = 2**31 // (block_size * num_kv_heads * head_dim) + 2
    key_cache, value_cache = ops.empty_cache(
        num_blocks, block_size, num_kv_heads, head_dim, dtype=torch.bfloat16, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    key, value, query = torch.randn(3, 3, num_kv_heads, head_dim, generator=generator).to(torch.bfloat16)
    last = num_blocks - 1
    slots = torch.arange(3) + last * block_size
    ops.reshape_and_cache(key, value, key_cache, value_cache, slots)
    assert torch.equal(key_cache[last, :3], key) and torch.equal(value_cache[last, :3], value)

    tables = {
        "block_table": torch.tensor([[last]], dtype=torch.int32),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
    }
    gathered_key, gathered_value = ops.gather_cache(key_cache, value_cache, **tables, max_seq_len=3)
    assert torch.equal(gathered_key[0], key) and torch.equal(gathered_value[0], value)
    batch = PagedBatch(
        query, key_cache, value_cache, **tables, cu_seqlens_q=torch.tensor([0, 3]).int(), max_query_len=3
    )
    assert_as_exact_as_torch(
        ops.attention(**batch.arguments), oracle(batch, {})[0], oracle(batch, {}, torch.bfloat16)[0]
    )
    ops.copy_blocks([key_cache], [value_cache], torch.tensor([[last, last - 1]]))
    assert torch.equal(key_cache[last - 1, :3], key) and torch.equal(value_cache[last - 1, :3], value)


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
def test_opcheck(op):
    for options in ({}, {"sinks": True, "alibi_slopes": True, "key_scale": 1, "value_scale": 2, "sliding_window": 8}):
        batch, options = build({"rows": [(1, 9), (3, 5)], "v_head_dim": 8}, options, torch.float32)
        torch.library.opcheck(getattr(torch.ops.paged, op).default, tuple(batch.arguments.values()), options)
