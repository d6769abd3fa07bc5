"""bench ops --device cuda: what it asks for, how it times, what it counts."""

import argparse

import pytest
import torch

from torch_paged.cli.bench import cuda_cases, cuda_ops
from torch_paged.cli.bench.cases import Case, Group
from torch_paged.cli.bench.cuda_cases import ATTENTION, AttentionGoal, moves
from torch_paged.cli.bench.cuda_ops_result import CudaResult, notes, panels, table
from torch_paged.cli.bench.cuda_timing import Clock, copy_bytes_per_s
from torch_paged.cli.bench.timing import Timing
from torch_paged.cli.errors import CommandError

ARGUMENTS = argparse.Namespace(seed=0, block_size=16, rounds=2)


class Device:
    """A GPU whose calls take the milliseconds that the test says, and its clock."""

    def __init__(self, milliseconds=lambda: 1.0):
        self.now, self.log, self._milliseconds = 0.0, [], milliseconds

    @property
    def clock(self):
        return Clock(self.event, lambda: self.log.append("flush"), lambda: self.log.append("wait"))

    def event(self):
        device = self

        class Event:
            def record(self):
                device.log.append("event")
                device.now += device._milliseconds() if device.log[-2:-1] != ["flush"] else 0
                self.at = device.now

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed(run):
    status, out, err = run("bench", "ops", "--device", "cuda")
    assert status != 0 and out == ""
    assert "--device cuda" in err and "finds no GPU; needs one of compute capability 8.0 or newer" in err


def test_an_old_gpu_and_a_build_without_kernels_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(CommandError, match="an old one; must have compute capability 8.0"):
        cuda_ops.require_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    with pytest.raises(CommandError, match="built without CUDA; install it again with nvcc on PATH"):
        cuda_ops.require_gpu()


def test_other_devices_are_refused(run):
    status, _, err = run("bench", "ops", "--device", "mps")
    assert status != 0 and "--device" in err


def test_each_call_is_timed_alone_and_finds_a_flushed_cache():
    device, calls = Device(iter(range(1, 100)).__next__), []
    ways = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    timings = device.clock.alternate(ways, rounds=3, warmup=1)
    assert calls == [(name, number) for number in (-1, 0, 1, 2) for name in "ab"]
    assert device.log == (["flush", "event", "event"] * 2 + ["wait"]) * 4
    # The calls take 1, 2, 3 ... ms; the first of each are the warm-up.
    assert timings["a"] == Timing(5e-3, 3e-3, 7e-3)
    assert timings["b"] == Timing(6e-3, 4e-3, 8e-3)


def test_the_limit_is_the_best_copy_reads_and_writes():
    device = Device(iter([9, 9, 9, 4, 2, 5]).__next__)
    assert copy_bytes_per_s(device.clock, rounds=3, nbytes=1000) == 2 * 1000 / 2e-3


def test_the_cases_are_those_with_goals():
    cases = {str(each.case): each.goal for each in ATTENTION}
    assert cases == {
        "decode 32/8×128 32×1/4096": "135 µs",
        "decode 32/8×128 8×1/32768": "90 % of copy",
        "decode 32/8×128 1×1/131072": "90 % of copy",
        "decode 64/8×128 16×1/500": "22 µs",
        "prefill 32/8×128 1×8192/8192": "320 TFLOP/s",
        "chunked 32/8×128 1×512/16896": "280 TFLOP/s",
    }
    assert ATTENTION[0].case.kv_bytes(torch.bfloat16) == 2 * 32 * 4096 * 8 * 128 * 2


def test_bytes_of_moves_are_those_read_and_written(monkeypatch):
    monkeypatch.setattr(cuda_cases, "HEAD_DIM", 8)
    made = {move.name.partition(" ")[0]: move for move in moves(torch.bfloat16, 16, num_layers=2, batch=6, context=32)}
    row = 8 * 8 * 2
    assert {name: move.nbytes for name, move in made.items()} == {
        "copy_blocks": 2 * (2 * 2 * 128 * 16 * row),  # read and written: 2 layers, K and V, 128 blocks
        "gather_cache": 2 * (2 * 32 * 32 * row),
        "merge_attention_states": 3 * (6 * 32 * 8 * 2 + 6 * 32 * 4),
        "reshape_and_cache": 2 * (2 * 6 * row) + 6 * 8,
    }
    gathered = made["gather_cache"].call(0)
    assert sum(part.nbytes for part in gathered) == made["gather_cache"].nbytes // 2
    for move in made.values():
        move.call(0)


@pytest.mark.parametrize(
    "case",
    [
        Case("decode", 4, 2, 16, (Group(3, 1, 40),)),
        Case("prefill", 4, 2, 16, (Group(1, 24, 24),)),
        Case("chunked", 4, 2, 16, (Group(1, 5, 40),)),
    ],
    ids=str,
)
def test_a_case_has_each_way_or_the_reason(case, monkeypatch):
    from torch_paged.cli.bench import flex

    def fails(*arguments):
        raise CommandError("no compiler")

    monkeypatch.setattr(flex, "flex_attention", fails)
    device = Device()
    result = cuda_ops.measure(AttentionGoal(case, "soon"), torch.float32, ARGUMENTS, device.clock)
    assert set(result.others) | set(result.missing) >= {"SDPA flash", "SDPA cuDNN", "FlexAttention"}
    assert not set(result.others) & set(result.missing)
    assert result.missing["FlexAttention"] == "no compiler"
    assert "SDPA cuDNN" in result.missing
    assert ("pages of 128" in result.others) == (case.kind == "decode")
    assert (result.flops is None) == (case.kind == "decode")
    assert result.nbytes == case.kv_bytes(torch.float32) + 2 * sum(case.query_lens) * 4 * 16 * 4


def test_a_wrong_answer_is_not_timed(monkeypatch):
    def others(inputs):
        return {"wrong": lambda: lambda number: torch.ones_like(inputs.query)}

    monkeypatch.setattr(cuda_ops, "others", others)
    case = Case("decode", 4, 2, 16, (Group(3, 1, 40),))
    with pytest.raises(CommandError, match="wrong differs from the paged op by"):
        cuda_ops.measure(AttentionGoal(case), torch.float32, ARGUMENTS, Device().clock)


def test_table_json_and_bars_show_the_same():
    decode = CudaResult(
        "decode x",
        torch.bfloat16,
        "135 µs",
        4_000_000,
        None,
        Timing(2e-6, 1e-6, 3e-6),
        {"flash": Timing(6e-6, 6e-6, 6e-6)},
    )
    prefill = CudaResult(
        "prefill y", torch.bfloat16, "", 1, 8_000_000, Timing(2e-6, 1e-6, 3e-6), missing={"cuDNN": "not here"}
    )
    assert decode.as_json(4e12)["share_of_copy"] == 0.5
    assert decode.as_json(4e12)["times_as_fast_as"] == {"flash": pytest.approx(3)}
    assert prefill.as_json(4e12)["share_of_copy"] is None and prefill.as_json(4e12)["flop_per_s"] == 4e12
    assert table([decode, prefill], 4e12).row_count == 2
    assert "– cuDNN: not here" in notes([decode, prefill], 4e12)
    speeds, shares = panels([decode, prefill], 4e12)
    assert speeds.series == {"flash": [pytest.approx(3), None]} and shares.series == {"paged": [50.0, None]}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(run):
    status, out, _ = run("bench", "ops", "--device", "cuda", "--shape", "2,8,2,64,300", "--rounds", "3")
    assert status == 0 and "decode 8/2×64" in out and "goal on" in out
