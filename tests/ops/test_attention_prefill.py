"""attention on a CPU with more query rows and keys than a kernel works on at once, against the float64 oracle."""

import pytest
import torch

from tests.assertions import assert_as_exact_as_torch, largest_error
from tests.ops.test_attention import build, oracle
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Groups of 4 heads: 1,200 rows, of which no piece takes more than 1,024; pieces that begin and end within blocks.
ROWS = [(300, 700), (17, 133), (5, 390), (1, 129)]
CASES = {
    "plain": ({}, {}),
    "bidirectional": ({}, {"causal": False}),
    "window": ({}, {"sliding_window": 90}),
    "window bidirectional": ({}, {"sliding_window": 200, "causal": False}),
    "num_splits": ({}, {"num_splits": 3}),
    "window num_splits": ({}, {"sliding_window": 301, "num_splits": 3}),
    "deterministic": ({}, {"deterministic": True}),
    "small blocks": ({"block_size": 8}, {"sliding_window": 333, "num_splits": 2}),
    "large blocks": ({"block_size": 128}, {"sliding_window": 333, "num_splits": 2}),
    "head_dim 80": ({"head_dim": 80, "v_head_dim": 40}, {}),
    "head_dim 192": ({"head_dim": 192, "v_head_dim": 128}, {}),
    "k_transposed": ({"layout": "k_transposed"}, {"num_splits": 2}),
    "unaligned": ({"layout": "unaligned"}, {"num_splits": 2}),
    "softcap": ({}, {"softcap": 2.0, "scale": 1.0}),
    "negative scale": ({}, {"scale": -0.3}),
    "scale 0": ({}, {"scale": 0.0}),
    "everything": (
        {"layout": "nhd"},
        {"softcap": 3.0, "alibi_slopes": True, "sinks": True, "key_scale": 2, "value_scale": 1, "sliding_window": 150},
    ),
}


def batch_of(sizes, options, dtype):
    return build({"rows": ROWS, "num_heads": 8, "head_dim": 64, **sizes}, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_matches_reference(sizes, options, dtype):
    batch, options = batch_of(sizes, options, dtype)
    out, lse = ops.attention_with_lse(**batch.arguments, **options)
    exact_out, exact_lse = oracle(batch, options)
    assert_as_exact_as_torch(out, exact_out, oracle(batch, options, dtype)[0])
    assert (
        largest_error(lse, exact_lse) <= 2 * largest_error(oracle(batch, options, torch.float32)[1], exact_lse) + 1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"num_splits": 3}], ids=str)
def test_values_that_are_not_finite_stay_with_the_rows_that_see_them_matches_reference(options, bad, dtype):
    batch, options = batch_of({}, options, dtype)
    key = 537  # of the first sequence, whose queries are keys 400 to 699
    block, slot = divmod(key, 16)
    batch.value_cache[batch.block_table[0, block], slot] = bad
    out = ops.attention(**batch.arguments, **options)
    window = options.get("sliding_window", 700)
    sees = torch.zeros(len(out), dtype=torch.bool)
    sees[key - 400 : min(key - 400 + window, 300)] = True
    assert not out[sees].isfinite().any()
    batch.value_cache[batch.block_table[0, block], slot] = 0
    exact_out, same_dtype_out = oracle(batch, options)[0], oracle(batch, options, dtype)[0]
    assert_as_exact_as_torch(out[~sees], exact_out[~sees], same_dtype_out[~sees])


def test_maxima_that_rise_from_key_to_key_matches_reference():
    """By far more than what a weight can be: what was summed before is corrected, and again."""
    batch, _ = batch_of({}, {}, torch.bfloat16)
    for sequence, (_, length) in enumerate(ROWS):
        for key in range(length):
            block, slot = divmod(key, 16)
            batch.key_cache[batch.block_table[sequence, block], slot] = key / 4
    batch.query.abs_()
    out, lse = ops.attention_with_lse(**batch.arguments)
    exact_out, exact_lse = oracle(batch, {})
    assert_as_exact_as_torch(out, exact_out, oracle(batch, {}, torch.bfloat16)[0])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
