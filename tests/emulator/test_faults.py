"""The faults planted in faults/decode.cu: the emulator names each, with its line, or its numbers come out wrong."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from tests.emulator.compile import compile_ptx
from tests.emulator.findings import Finding
from tests.emulator.launch import Emulator
from tests.emulator.library import NO_NVCC, has_nvcc

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)

SOURCE = Path(__file__).parent / "faults" / "decode.cu"
NAMES = re.findall(r"^  (k\w+),$", SOURCE.read_text().partition("enum Fault")[2].partition("};")[0], re.M)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_SPLITS = 8, 2, 64, 16, 3
SEQ_LENS = [1, 300, 450]
# Query, keys and values of two tiles each; the merge has its weights alone.
DECODE_SHARED, MERGE_SHARED = (16 + 4 * 64) * HEAD_DIM * 2, 33 * 4

# Beginnings of lines of decode.cu, one of a kind.
READS_QUERY, READS_KEYS, READS_VALUES = "ldmatrix_x4(fragments[step]", "ldmatrix_x4(k, ", "ldmatrix_x4_transposed(v, "
COPIES_KEYS, WAITS = "cp_async_16(shared + kKeys", "cp_async_wait<fault"
WRITES_QUERY, WRITES_STATS = "*reinterpret_cast<uint4*>(shared + kQuery", "if ((lane & 3) == 0) stats[row]"
WRITES_OUT = "p.part_out[slot * kHeadDim + dim] ="
# What is wrong, on which line, and by which other line's access.
REPORTS = {
    "kNoBarrierAfterWait": ("of shared: race with a write", READS_KEYS, WAITS),
    "kNoBarrierBeforeRefill": ("of shared: race with a read", COPIES_KEYS, READS_KEYS),
    "kWaitsForOneLess": ("of shared: touches a cp.async still in flight", READS_KEYS, COPIES_KEYS),
    "kReadsPastTable": ("past the end of block_table", "const int block = is_there", None),
    "kNoZeroFill": ("of shared: uninitialised", READS_KEYS, None),
    "kMergesEmptySplit": ("of part_out: uninitialised", "out += weights[split]", None),
    "kShufflesHalfAWarp": ("never completed: shfl.sync", "new_max[half] = fmaxf(new_max[half], __shfl_xor", None),
    "kNoBarrierAfterQuery": ("of shared: race with a write", READS_QUERY, WRITES_QUERY),
    "kRowOffByOne": ("of shared: touches a cp.async still in flight", COPIES_KEYS, COPIES_KEYS),
    "kMisalignedQuery": ("misaligned for 16 bytes", "if (row < group) piece =", None),
    # The warps that skip the barrier run on into what the others still read.
    "kBarrierOfSomeWarps": ("of shared: race with a read", WRITES_STATS, READS_VALUES),
    "kSplitsShareASlot": ("of part_out: another thread writes another value at once", WRITES_OUT, None),
    "kNoBarrierBeforeSum": ("of shared: race with a write", "for (int w = 0; w < kWarps; ++w) all_max", WRITES_STATS),
}
WRONG_NUMBERS = ["kSwapsMatrixHalves"]


class Params(ctypes.Structure):
    """DecodeParams of decode.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key_cache", "value_cache", "block_table", "seq_lens")),
        *((name, ctypes.c_void_p) for name in ("out", "part_out", "part_lse")),
        *((name, ctypes.c_int) for name in ("num_heads", "num_kv_heads", "block_size", "max_blocks", "num_splits")),
        ("scale", ctypes.c_float),
    ]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return compile_ptx(SOURCE, tmp_path_factory.mktemp("faults"))


def case():
    """Shuffled blocks, NaN in the slots of nobody, -1 in unused table entries."""
    generator = torch.Generator().manual_seed(0)
    blocks_of = [-(-seq_len // BLOCK_SIZE) for seq_len in SEQ_LENS]
    shuffled = torch.randperm(sum(blocks_of) + 3, generator=generator).tolist()
    table = torch.full((len(SEQ_LENS), max(blocks_of)), -1, dtype=torch.int32)
    caches = torch.full((2, len(shuffled), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), torch.nan, dtype=torch.bfloat16)
    for s, seq_len in enumerate(SEQ_LENS):
        for column in range(blocks_of[s]):
            table[s, column] = block = shuffled.pop()
            filled = min(BLOCK_SIZE, seq_len - column * BLOCK_SIZE)
            caches[:, block, :filled] = torch.randn(2, filled, NUM_KV_HEADS, HEAD_DIM, generator=generator).bfloat16()
    query = torch.randn(len(SEQ_LENS), NUM_HEADS, HEAD_DIM, generator=generator).bfloat16()
    return {
        "query": query,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_table": table,
        "seq_lens": torch.tensor(SEQ_LENS, dtype=torch.int32),
        "out": torch.full_like(query, torch.nan),
        "part_out": torch.full((len(SEQ_LENS), NUM_HEADS, NUM_SPLITS, HEAD_DIM), torch.nan),
        "part_lse": torch.full((len(SEQ_LENS), NUM_HEADS, NUM_SPLITS), torch.nan),
    }


def run(module, fault, traffic=None):
    """Return the result of the kernels with a fault, and the exact one."""
    tensors = case()
    emulator = Emulator(module, traffic=traffic)
    for name, tensor in tensors.items():
        is_result = name in ("out", "part_out", "part_lse")
        size = tensor.nbytes
        emulator.memory.add(name, tensor.data_ptr(), size, writable=is_result, initialised=not is_result)
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    sizes = (NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, tensors["block_table"].shape[1], NUM_SPLITS)
    parameters = bytes(Params(*pointers, *sizes, HEAD_DIM**-0.5))
    grid = (NUM_SPLITS, NUM_KV_HEADS, len(SEQ_LENS))
    emulator.launch(kernel_of(module, "decode", fault), grid, (128, 1, 1), DECODE_SHARED, parameters)
    grid = (NUM_HEADS, len(SEQ_LENS), 1)
    emulator.launch(kernel_of(module, "merge", fault), grid, (HEAD_DIM, 1, 1), MERGE_SHARED, parameters)
    return tensors["out"].double(), exact(tensors)


def kernel_of(module, kernel, fault):
    (name,) = [n for n in module.kernels if f"{len(kernel)}{kernel}IL" in n and f"Fault{NAMES.index(fault)}E" in n]
    return name


def exact(tensors):
    out = torch.zeros(tensors["query"].shape, dtype=torch.float64)
    for s, seq_len in enumerate(SEQ_LENS):
        blocks = tensors["block_table"][s, : -(-seq_len // BLOCK_SIZE)].long()
        keys, values = (tensors[name][blocks].flatten(0, 1)[:seq_len].double() for name in ("key_cache", "value_cache"))
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            weights = (keys[:, kv_head] @ tensors["query"][s, head].double() * HEAD_DIM**-0.5).softmax(0)
            out[s, head] = weights @ values[:, kv_head]
    return out


def place(beginning):
    """Return `decode.cu:<line>` of the line that begins so."""
    lines = SOURCE.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.strip().startswith(beginning)]
    return f"decode.cu:{found[0]}"


def test_every_fault_has_a_test():
    assert sorted(NAMES) == sorted(["kNone", *REPORTS, *WRONG_NUMBERS])


def test_nothing_is_found_where_nothing_is_planted(module):
    out, expected = run(module, "kNone")
    assert (out - expected).abs().max() < 0.01


@pytest.mark.parametrize("fault", REPORTS)
def test_fault_is_named_with_its_line(module, fault):
    with pytest.raises(Finding) as found:
        run(module, fault)
    what, where, other = REPORTS[fault]
    report = str(found.value)
    first, _, second = report.partition(what)
    assert second or report.endswith(what), report
    # A report of divergence lists the places after what is wrong, an access comes before it.
    assert f"at {place(where)}" in (second if what.startswith("never") else first), report
    assert re.search(r"block \d+ thread \d+", report)
    assert other is None or f"at {place(other)}" in second, report


@pytest.mark.parametrize("fault", WRONG_NUMBERS)
def test_fault_shows_as_wrong_numbers(module, fault):
    out, expected = run(module, fault)
    assert (out - expected).abs().max() > 0.1
