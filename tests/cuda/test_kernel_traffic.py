"""What the attention kernels' accesses cost: whole sectors of the pages, few bank conflicts in the main loops."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from tests.emulator.library import NO_NVCC, emulated, emulated_ops, has_nvcc
from tests.paged_batch import paged_batch
from torch_paged import ops

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)

# Where the kernels are once the last tile is done: a block runs it once.
AFTER_THE_LOOP = ("attention_epilogue.cuh", "attention_merge.cuh")


def samples():
    """Decode by each head dimension that has a kernel, prefill by tiles of 64 and 128 rows."""
    for head_dim in (64, 80, 96, 112, 128, 160, 192, 256, 512):
        yield f"decode {head_dim}", {"rows": [(1, 200), (1, 90)], "head_dim": head_dim}
    yield "decode of pages of 1", {"rows": [(1, 70)], "head_dim": 128, "block_size": 1}
    yield "decode nhd", {"rows": [(1, 70)], "head_dim": 128, "layout": "nhd"}
    yield "prefill", {"rows": [(70, 90)], "head_dim": 128}
    yield "prefill 256", {"rows": [(70, 90)], "head_dim": 256}


def costs(sizes, dtype=torch.bfloat16):
    """Return, by space, opcode and line: bytes, units of cost, and the least for so many bytes."""
    batch = paged_batch(num_heads=8, num_kv_heads=2, dtype=dtype, **sizes)
    with emulated("attention"), emulated_ops().counting() as traffic:
        ops.attention(**batch.arguments)
    sums = defaultdict(lambda: [0, 0, 0])
    for cost in traffic.costs.values():
        line = sums[cost.space, cost.opcode, cost.where]
        for n, part in enumerate((cost.bytes, cost.units, cost.least)):
            line[n] += part
    return dict(sums)


@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in samples()])
def test_pages_come_in_whole_sectors_and_without_bank_conflicts(sizes):
    found = costs(sizes)
    copies = {key: cost for key, cost in found.items() if key[0] == "global" and key[1].startswith("cp.async.cg")}
    tokens = sum(seq_len for _, seq_len in sizes["rows"])
    # Each key and value of each head once, and the query.
    assert sum(num_bytes for num_bytes, *_ in copies.values()) >= 2 * 2 * tokens * sizes["head_dim"] * 2
    assert all(sectors == least for _, sectors, least in copies.values()), copies

    loop = in_the_loop(found)
    assert any("ldmatrix" in opcode for _, opcode, _ in loop)
    assert conflicts(loop) == {}


@pytest.mark.parametrize("head_dim", (64, 80, 128, 192, 256, 512))
@pytest.mark.parametrize("rows", ([(1, 70), (1, 40)], [(21, 50)]), ids=("decode", "prefill"))
def test_float32_without_bank_conflicts(rows, head_dim):
    loop = in_the_loop(costs({"rows": rows, "head_dim": head_dim}, torch.float32))
    assert any(opcode.startswith("st.shared") for _, opcode, _ in loop)
    assert any(opcode.startswith("ld.shared.v4") for _, opcode, _ in loop)
    assert conflicts(loop) == {}


def in_the_loop(found):
    return {key: cost for key, cost in found.items() if key[0] == "shared" and not key[2].startswith(AFTER_THE_LOOP)}


def conflicts(loop):
    """Of more than two ways, by access."""
    return {key: wavefronts / least for key, (_, wavefronts, least) in loop.items() if wavefronts > 2 * least}
