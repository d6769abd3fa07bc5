"""bench: what it measures, and that it refuses to time a wrong answer."""

import json
import math
import re

import pytest
import torch
from rich.console import Console
from torch.nn.attention import flex_attention as torch_flex

from torch_paged.cli.bench import attention_ways, copies, flex, timing
from torch_paged.cli.bench import bare_read as bare_read_module
from torch_paged.cli.bench import limits as limits_module
from torch_paged.cli.bench.attention_ways import Inputs
from torch_paged.cli.bench.bare_read import bare_read, read_blocks, read_bytes
from torch_paged.cli.bench.cases import DEFAULT_CASES, Case, Group, parse_case
from torch_paged.cli.bench.last_level_cache import _from_sysfs, last_level_cache_bytes
from torch_paged.cli.bench.limits import Probes
from torch_paged.cli.bench.ops import apart, layers_to_rotate, measure_again, require_agreement
from torch_paged.cli.bench.ops_result import Result, table
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
    assert report["read_working_set_bytes"] >= 4 * report["last_level_cache_bytes"]
    assert [result["limited_by"] for result in report["results"]] == ["reading"] * 2 + ["multiplying"] * 4
    for result in report["results"]:
        bare_read = result["bare_read"]
        assert result["limit_per_s"] > 0 and (bare_read is not None) == (result["limited_by"] == "reading")
        if bare_read:
            assert result["speedup_over_bare_read"] == bare_read["median_s"] / result["paged"]["median_s"]
        assert result["share_of_limit"] is None or 0 < result["share_of_limit"] <= 1
        fastest = min(timing["median_s"] for timing in result["gather_and_sdpa"].values())
        assert result["speedup_over_gather_and_sdpa"] == pytest.approx(fastest / result["paged"]["median_s"])
        assert result["paged"]["min_s"] <= result["paged"]["median_s"] <= result["paged"]["max_s"]


def test_ops_table(run):
    status, out, _ = run(
        "bench", "ops", "--shape", "2,4,2,32,40", "--rounds", "1", "--threads", "1", "--dtype", "float32"
    )
    assert status == 0
    assert "decode" in out and "4/2×32" in out and "1 threads" in out and "rounds 1, seed 0" in out
    assert "Limits: the median of the best of several probes in the same rounds" in out


def test_ops_on_other_pages(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'torch_paged[bench]'")
    options = ("--shape", "2,4,2,32,40", "1,2,2,16,24,24", "--rounds", "1", "--dtype", "float32", "--pages")
    status, out, _ = run("bench", "ops", *options, "--json", "--plot", str(tmp_path / "ops.png"))
    decode, prefill = json.loads(out)["results"]
    assert status == 0 and (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    for name in ("other_pages", "bare_read_of_other_pages"):
        assert set(decode[name]) == {"pages in order", "pages of 128"} and not prefill[name]


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
    assert status == 0 and stock["read_bytes_per_s"] > 0

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


def test_profile_counts_the_fast_layers(run):
    shape = "--layers 2 --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 211 --dtype bfloat16"
    asked = "--batch 3 --context 20 --ways dynamic paged --rounds 2 --profile --json"
    status, out, _ = run("bench", "steps", *shape.split(), *asked.split())
    stock, ours = (result["profile"]["products"] for result in json.loads(out)["results"])
    assert status == 0
    # Whatever is computed by one op, a step reads as many weights.
    weights = [sum(each["calls"] * math.prod(each["weight"]) for each in products) for products in (stock, ours)]
    assert weights[0] == weights[1] == 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128) + 211 * 64


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


def test_cost_of_pages():
    slow, quick = Timing(3.0, 1.0, 9.0), Timing(2.0, 1.0, 9.0)
    case = Case("decode", 4, 2, 8, (Group(1, 1, 10),))
    measured = Result(
        case, torch.float32, 1, True, 1e9, slow, {"form": slow}, {"form": slow},
        pages={"pages in order": quick}, bare_read=quick, bare_reads={"pages in order": slow},
    )  # fmt: skip
    assert measured.cost_over("pages in order") == (3 / 2, 2 / 3)
    assert "1.50x" in shown_at(160, [measured]) and "(0.67x)" in shown_at(160, [measured])


def test_the_table_fits_a_terminal_written_to_a_file():
    timing = Timing(0.0999, 0.08991, 0.1698)
    pages = {"pages in order": timing, "pages of 128": timing}
    forms = {"heads repeated": timing}
    decode, mixed = (
        Result(
            case, torch.bfloat16, 1, True, 1e11, timing, forms, forms, flex=timing,
            pages=pages if case.kind == "decode" else {}, bare_reads=pages, bare_read=timing,
        )
        for case in (DEFAULT_CASES[4], DEFAULT_CASES[8])
    )  # fmt: skip
    text = shown_at(160, [decode, mixed])
    assert "…" not in text and all(part in text for part in ("1×1/32768", "+ 1×256/1024", "pages of 128"))


def shown_at(width, results):
    console = Console(width=width)
    with console.capture() as shown:
        console.print(table(results))
    return shown.get()


def test_bytes_of_a_bare_read():
    inputs = Inputs.random(MIXED, torch.float32, block_size=4, num_layers=1)
    # Three sequences of 21 tokens, one of 17, two of 9: 18, 5 and 6 blocks of 4.
    assert read_bytes(inputs) == 2 * (18 + 5 + 6) * 4 * 2 * 16 * 4
    assert Timing(2.0, 1.0, 4.0).scaled(0.5) == Timing(1.0, 0.5, 2.0)


def broken(*args, **kwargs):
    raise RuntimeError("no compiler\nand much more")


def result(kind, seconds, limit, read_from_memory=True):
    case = Case(kind, 4, 2, 8, (Group(1, 1 if kind == "decode" else 10, 10),))
    timing = Timing(seconds, seconds, seconds)
    return Result(case, torch.float32, 1, read_from_memory, limit, timing, {"form": timing}, {"form": timing})


def test_share_of_the_limit():
    # 10 tokens of 2 heads of 8 in float32, keys and values; 55 visible pairs of 4 heads of 8.
    assert result("decode", 1, 2560.0).share == 1280 / 2560
    assert result("prefill", 1, 14080.0).share == 4 * 55 * 4 * 8 / 14080
    assert result("decode", 1, 2560.0, read_from_memory=False).share is None
    assert result("prefill", 1, 14080.0, read_from_memory=False).share == 0.5
    # Faster than the limit: then it is none.
    assert result("decode", 0.4, 2560.0).share is None
    assert result("decode", 0.4, 2560.0).as_json()["faster_than_limit"]
    assert not result("decode", 1, 2560.0).as_json()["faster_than_limit"]
    assert not result("decode", 0.4, 2560.0, read_from_memory=False).as_json()["faster_than_limit"]


@pytest.mark.parametrize(
    ("seconds", "expected", "times"), [([1, 0.4], 1, 1), ([0.4, 1], 1, 2), ([0.4, 0.3, 0.2, 0.1, 1], 0.1, 4)]
)
def test_what_surpasses_its_limit_is_measured_again(seconds, expected, times):
    results = [result("decode", each, 2560.0) for each in seconds]
    left = iter(results)
    assert measure_again(lambda: next(left)).paged.median == expected
    assert len(list(left)) == len(results) - times


def test_a_limit_is_the_median_of_the_best_probe():
    probes = Probes()
    slow, quick, ours = Timing(2.0, 0.1, 3.0), Timing(0.5, 0.4, 9.0), Timing(0.1, 0.1, 0.1)
    assert probes.limit({"read sum": slow, "read maximum": quick, "paged": ours}) == probes.read_bytes / 0.5
    assert probes.limit({"multiply float32": slow, "multiply bfloat16": quick, "paged": ours}) == 2 * 64**3 / 0.5


@pytest.mark.parametrize("size", [(64, 64), (3, 192), (5, 4096 * 3), (1, 64)], ids=str)
def test_read_blocks_reads_each_block_once(size):
    torch.manual_seed(0)
    cache = torch.randint(256, size, dtype=torch.uint8)
    blocks = torch.randperm(size[0])[: size[0] // 2 + 1]
    expected = 0
    for word in cache[blocks].view(torch.int32).flatten().tolist():
        expected ^= word
    assert read_blocks(cache, blocks) == expected
    assert read_blocks(cache, blocks[:0]) == 0


@pytest.mark.parametrize(
    ("cache", "blocks", "message"),
    [
        ((4, 32), [1], "cache: size 32 in dimension 1; must be a multiple of 64"),
        ((4, 64, 1), [1], "cache: shape [4, 64, 1]; must be 2-D [num_blocks, block_bytes]"),
        ((4, 64), [1, 4], "blocks: value 4 at [1]; must be in [0, 4) (num_blocks)"),
        ((4, 64), [-1], "blocks: value -1 at [0]; must be in [0, 4) (num_blocks)"),
    ],
)
def test_read_blocks_refuses(cache, blocks, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        read_blocks(torch.zeros(cache, dtype=torch.uint8), torch.tensor(blocks))


def test_bare_read_is_of_what_the_sequences_hold(monkeypatch):
    seen = []
    monkeypatch.setattr(bare_read_module, "read_blocks", lambda cache, blocks: seen.append(cache[blocks]) or 0)
    inputs = Inputs.random(MIXED, torch.float32, block_size=4, num_layers=2)
    bare_read(inputs)(3)
    table = inputs.block_table
    for cache, blocks in zip(inputs.caches[1], seen, strict=True):
        assert torch.equal(blocks.view(torch.float32), cache[table[table >= 0]].transpose(1, 2).flatten(1))


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
