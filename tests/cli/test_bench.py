"""bench: what it measures, and that it refuses to time a wrong answer."""

import json
import math

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from torch_paged.cli.bench import attention_ways, copies, flex, timing
from torch_paged.cli.bench import limits as limits_module
from torch_paged.cli.bench.attention_ways import Inputs
from torch_paged.cli.bench.cases import DEFAULT_CASES, Case, Group, parse_case
from torch_paged.cli.bench.last_level_cache import _from_sysfs, last_level_cache_bytes
from torch_paged.cli.bench.limits import Limits
from torch_paged.cli.bench.ops import apart, layers_to_rotate, look_again, require_agreement
from torch_paged.cli.bench.ops_result import Result
from torch_paged.cli.bench.timing import Timing, alternate
from torch_paged.cli.errors import CommandError


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """A limit that is measured in no time, and is none."""
    monkeypatch.setattr(limits_module, "MATMUL_SIZE", 64)


MIXED = Case("mixed", 4, 2, 16, (Group(3, 1, 21), Group(1, 5, 17), Group(2, 9, 9)))


def test_ops_json(run):
    shapes = ("--shape", "2,4,2,32,40", "--shape", "1,2,2,16,24,24", "1,4,1,16,32,8")
    status, out, _ = run("bench", "ops", *shapes, "--rounds", "2", "--dtype", "float32", "bfloat16", "--json")
    report = json.loads(out)
    assert status == 0
    assert [result["dtype"] for result in report["results"]] == ["float32", "bfloat16"] * 3
    assert report["results"][0]["case"] == "decode 4/2×32 2×1/40"
    assert report["environment"]["torch"] == torch.__version__ and report["seed"] == 0
    limits = report["limits"]
    assert limits["read_bytes_per_s"] > 0 and set(limits["multiply_flop_per_s"]) == {"float32", "bfloat16"}
    assert limits["read_working_set_bytes"] >= 4 * limits["last_level_cache_bytes"]
    assert [result["limit"] for result in report["results"]] == ["read"] * 2 + ["multiply"] * 4
    for result in report["results"]:
        assert result["share_of_limit"] is None or 0 < result["share_of_limit"] <= 1
        fastest = min(timing["median_s"] for timing in result["gather_and_sdpa"].values())
        assert result["speedup_over_gather_and_sdpa"] == pytest.approx(fastest / result["paged"]["median_s"])
        assert result["paged"]["min_s"] <= result["paged"]["median_s"] <= result["paged"]["max_s"]


def test_ops_table(run):
    status, out, _ = run(
        "bench", "ops", "--shape", "2,4,2,32,40", "--rounds", "1", "--threads", "1", "--dtype", "float32"
    )
    assert status == 0
    assert "decode 4/2×32" in out and "1 threads" in out and "rounds 1, seed 0" in out
    assert "Limits, the best of several probes in this run: read " in out


def test_ops_on_other_pages(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'torch_paged[bench]'")
    options = ("--shape", "2,4,2,32,40", "1,2,2,16,24,24", "--rounds", "1", "--dtype", "float32", "--pages")
    status, out, _ = run("bench", "ops", *options, "--json", "--plot", str(tmp_path / "ops.png"))
    decode, prefill = json.loads(out)["results"]
    assert status == 0 and (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert set(decode["other_pages"]) == {"pages in order", "pages of 128"} and not prefill["other_pages"]


def test_steps(run):
    shape = "--layers 2 --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 211 --dtype float32"
    asked = "--batch 1 3 --context 20 --padded --ways dynamic static paged --rounds 2 --json"
    status, out, _ = run("bench", "steps", *shape.split(), *asked.split())
    results = json.loads(out)["results"]
    assert status == 0
    ways = ["DynamicCache", "StaticCache", "torch_paged"]
    assert [(result["rows"], result["way"]) for result in results] == [(n, way) for n in (1, 3) for way in ways]
    for result in results:
        first = next(each for each in results if each["rows"] == result["rows"])
        ratio = first["step"]["median_s"] / result["step"]["median_s"]
        assert result["speedup_over_first_way"] == ratio and result["first_step_s"] > 0


def test_profile_of_steps(run):
    shape = "--layers 2 --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 211 --dtype float32"
    asked = "--batch 3 --context 20 --ways dynamic paged-compiled --rounds 2 --profile --json"
    status, out, _ = run("bench", "steps", *shape.split(), *asked.split())
    report = json.loads(out)
    stock, ours = (result["profile"] for result in report["results"])
    assert status == 0 and report["read_bytes_per_s"] > 0

    def products(profile):
        return {tuple(each["weight"]): each["calls"] for each in profile["products"]}

    # q and o; k and v; gate and up; down; the head.
    assert products(stock) == {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2, (211, 64): 1}
    # 32 outputs of 2 inputs at a time. q, k and v are one of 128 outputs, gate and up one of 256.
    assert products(ours) == {(4, 32, 64): 2, (2, 32, 64): 2, (8, 32, 64): 2, (2, 64, 64): 2, (7, 32, 64): 1}
    for profile in (stock, ours):
        parts = [profile[name] for name in ("products_s", "attention_s", "writes_s", "rest_s", "host_s")]
        assert sum(part or 0.0 for part in parts) == pytest.approx(profile["step_s"])
        assert all(part > 0 for part in parts if part) and 0 <= profile["products_share_fast"] <= 1
    # Stock writes by torch.cat, and is not compiled.
    assert stock["host_s"] is None and stock["writes_s"] == 0 < ours["writes_s"] and ours["host_s"] > 0
    for each in ours["products"]:
        assert each["bytes_per_s"] == 4 * math.prod(each["weight"]) / each["seconds"]


def test_copies(run, monkeypatch):
    monkeypatch.setattr(copies, "last_level_cache_bytes", lambda: 4096)
    status, out, _ = run(
        "bench", "copies", "--tokens", "40", "--block-size", "4", "--rounds", "2", "--dtype", "float32", "--json"
    )
    results = {result["op"]: result for result in json.loads(out)["results"]}
    assert status == 0
    # 40 tokens of 8 sequences are 8 tokens each in whole blocks of 4; read and written, keys and values of 8 heads.
    kv = 2 * 64 * 8 * 128 * 4
    rope = 2 * kv + 2 * 64 * 32 * 128 * 4 + 2 * 64 * 128 * 4
    moved = {"Tensor.copy_": 2 * kv, "reshape_and_cache": 2 * kv, "rope_and_cache": rope, "gather_cache": 2 * kv}
    assert {name: result["moved_bytes"] for name, result in results.items()} == moved | {
        "copy_blocks": kv,
        "swap_blocks": 2 * kv,
    }
    for name, result in results.items():
        assert result["bytes_per_s"] == result["moved_bytes"] / result["call"]["median_s"], name
    assert results["Tensor.copy_"]["rate_over_plain_copy"] == 1


def test_bookkeeping(run):
    options = ("--batch", "3", "--layers", "2", "--context", "40", "--rounds", "40", "--block-size", "4")
    options += ("--host-batch", "2")
    status, out, _ = run("bench", "bookkeeping", *options, "--json")
    report = json.loads(out)
    assert status == 0
    assert 0 < report["step"]["min_s"] <= report["step"]["median_s"] <= report["step"]["max_s"]
    assert (report["batch"], report["layers"], report["rounds"]) == (3, 2, 40)
    assert report["median_s_per_layer"] == report["step"]["median_s"] / 2
    measured = [(host["way"], host["batch"], host["context"]) for host in report["host"]]
    assert measured == [(way, 2, context) for way in ("rotate_and_update", "update") for context in (16, 40)]
    assert all(0 < host["min_s"] <= host["median_s"] <= host["max_s"] for host in report["host"])
    status, out, _ = run("bench", "bookkeeping", *options)
    assert status == 0 and "batch 3, layers 2, context 40" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [MIXED, *(c for c in map(parse_case, ("2,6,2,16,33", "2,4,4,8,20,20")))], ids=str)
def test_every_way_computes_the_same(case, dtype):
    torch.manual_seed(0)
    inputs = Inputs.random(case, dtype, block_size=4, num_layers=2)
    ways = {"paged": attention_ways.paged(inputs)}
    ways["in order"] = attention_ways.paged(inputs.repaged(8, in_order=True))
    ways["in larger blocks"] = attention_ways.paged(inputs.repaged(32, in_order=False))
    layers = attention_ways.contiguous_layers(inputs)
    for name, form in attention_ways.sdpa_forms(inputs).items():
        ways |= {f"gather {name}": attention_ways.gathered(inputs, form)}
        ways |= {f"contiguous {name}": attention_ways.contiguous(inputs, layers, form)}
    require_agreement(case, ways, dtype)
    tokens = sum(case.query_lens)
    assert all(way(1).shape == (tokens, case.num_heads, case.head_dim) for way in ways.values())
    with pytest.raises(CommandError, match="broken differs from the paged op"):
        require_agreement(case, {**ways, "broken": lambda number: ways["paged"](number) + 1}, dtype)
    with pytest.raises(CommandError, match="broken differs from the paged op by nan"):
        require_agreement(case, {**ways, "broken": lambda number: ways["paged"](number) * torch.nan}, dtype)


def test_blocks_in_order_follow_one_another():
    torch.manual_seed(0)
    inputs = Inputs.random(MIXED, torch.float32, block_size=4, num_layers=1)
    table = inputs.repaged(8, in_order=True).block_table
    assert table[table >= 0].tolist() == list(range(3 * 3 + 3 + 2 * 2))
    assert table[5].tolist() == [14, 15, -1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_one_more_form(monkeypatch):
    # Uncompiled, it computes the same; to compile it takes half a minute.
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    inputs = Inputs.random(MIXED, torch.float32, block_size=4, num_layers=1)
    way = attention_ways.contiguous(inputs, attention_ways.contiguous_layers(inputs), flex.flex_attention)
    require_agreement(MIXED, {"paged": attention_ways.paged(inputs), "flex": way}, torch.float32)
    monkeypatch.setattr(flex, "_compiled", lambda: broken)
    with pytest.raises(CommandError, match="--flex: FlexAttention does not compile here: no compiler$"):
        way(0)


def broken(*args, **kwargs):
    raise RuntimeError("no compiler\nand much more")


def result(kind, seconds, read_from_memory=True):
    case = Case(kind, 4, 2, 8, (Group(1, 1 if kind == "decode" else 10, 10),))
    timing = Timing(seconds, seconds, seconds)
    return Result(case, torch.float32, 1, read_from_memory, timing, {"form": timing}, {"form": timing})


def test_share_of_the_limit():
    limits = Limits()
    limits.bytes_per_s, limits.flop_per_s = 2560.0, {torch.float32: 14080.0}
    # 10 tokens of 2 heads of 8 in float32, keys and values; 55 visible pairs of 4 heads of 8.
    assert result("decode", 1).share(limits) == 1280 / 2560
    assert result("prefill", 1).share(limits) == 4 * 55 * 4 * 8 / 14080
    assert result("decode", 1, read_from_memory=False).share(limits) is None
    assert result("prefill", 1, read_from_memory=False).share(limits) == 0.5
    # Faster than the limit: then it is none.
    assert result("decode", 0.4).share(limits) is None
    assert result("decode", 0.4).as_json(limits)["faster_than_limit"]
    assert not result("decode", 1).as_json(limits)["faster_than_limit"]


def test_limits_that_an_op_surpasses_are_probed_again(monkeypatch):
    limits, probed = Limits(), []
    limits.bytes_per_s, limits.flop_per_s = 1280.0, {torch.float32: 7040.0}

    def probe_reading(rounds):
        probed.append("read")
        limits.bytes_per_s *= 2

    def probe_multiplying(dtype, rounds):
        probed.append(dtype)
        limits.flop_per_s[dtype] *= 2

    monkeypatch.setattr(limits, "probe_reading", probe_reading)
    monkeypatch.setattr(limits, "probe_multiplying", probe_multiplying)
    look_again([result("decode", 1), result("prefill", 1)], limits, 1)
    assert probed == []
    look_again([result("decode", 0.4), result("prefill", 0.6)], limits, 1)
    assert probed == ["read", torch.float32, "read"]


def test_limits_learn_the_best_round_of_the_best_probe():
    limits = Limits()
    slow, quick = Timing(2.0, 1.0, 3.0), Timing(0.6, 0.5, 9.0)
    limits.learn({"read sum": slow, "read maximum": quick, "paged": Timing(0.1, 0.1, 0.1)}, torch.float32)
    limits.learn({"read sum": slow, "multiply float32": quick}, torch.bfloat16)
    assert limits.bytes_per_s == limits.read_bytes / 0.5
    assert limits.flop_per_s == {torch.bfloat16: 2 * 64**3 / 0.5}


def test_last_level_cache_of_the_system(tmp_path):
    # Two cores with an L2 each; an L3 for both, and one for two more.
    for cpu, owners in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        for index, (level, size, shared) in enumerate([(1, "32K", cpu), (2, "1024K", cpu), (3, "32768K", owners)]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    assert _from_sysfs(tmp_path) == 64 << 20
    assert _from_sysfs(tmp_path / "cpu0") == 0
    assert last_level_cache_bytes() > 0


def test_ways_that_run_after_one_another_read_other_layers():
    ways = apart({name: lambda number: number for name in "abcd"}, num_layers=8)
    assert [way(3) for way in ways.values()] == [3, 5, 7, 9]


def test_ways_alternate():
    calls = []
    timings = alternate({"a": lambda n: calls.append(f"a{n}"), "b": lambda n: calls.append(f"b{n}")}, rounds=2)
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert set(timings) == {"a", "b"}


def test_the_first_calls_of_a_turn_are_not_timed(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def way(name, *seconds):
        def call(number):
            calls.append(name)
            now[0] += seconds[number % len(seconds)]

        return call

    timings = alternate({"slow at first": way("a", 1, 1, 3, 2), "long": way("b", 7)}, rounds=1, settling_s=2)
    assert "".join(calls) == "aab" + "aabb"
    assert timings == {"slow at first": Timing(2, 2, 2), "long": Timing(7, 7, 7)}


def test_flops_and_bytes_of_a_case():
    case = Case("mixed", 4, 2, 8, (Group(2, 1, 10), Group(1, 3, 5)))
    visible = 2 * 10 + (3 + 4 + 5)
    assert case.flops() == visible * 4 * 8 * 2 * 2
    assert case.kv_bytes(torch.bfloat16) == (10 + 10 + 5) * 2 * 8 * 2 * 2


def test_cases_of_the_command_line():
    assert parse_case("8,32,8,128,2048") == DEFAULT_CASES[1]
    assert parse_case("1,32,8,128,512,512") == DEFAULT_CASES[5]
    assert parse_case("1,32,8,128,4096,256") == DEFAULT_CASES[7]


def test_layers_rotate_through_more_than_the_cache_but_not_through_all_memory():
    assert layers_to_rotate(1 << 40) == 1
    assert layers_to_rotate(16 << 20) * (16 << 20) >= min(4 * last_level_cache_bytes(), 2 << 30)
    assert layers_to_rotate(1) == 128
