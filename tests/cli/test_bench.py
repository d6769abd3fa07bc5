"""bench: what it measures, and that it refuses to time a wrong answer."""

import json

import pytest
import torch

from torch_paged.cli.bench import attention_ways
from torch_paged.cli.bench.attention_ways import Inputs
from torch_paged.cli.bench.cases import DEFAULT_CASES, Case, Group, parse_case
from torch_paged.cli.bench.ops import layers_to_rotate, require_agreement
from torch_paged.cli.bench.timing import alternate
from torch_paged.cli.errors import CommandError

MIXED = Case("mixed", 4, 2, 16, (Group(3, 1, 21), Group(1, 5, 17), Group(2, 9, 9)))


def test_ops_json(run):
    cases = ("2,4,2,32,40", "1,2,2,16,24,24", "1,4,1,16,32,8")
    status, out, _ = run("bench", "ops", "--case", *cases, "--rounds", "2", "--dtype", "float32", "bfloat16", "--json")
    report = json.loads(out)
    assert status == 0
    assert [result["dtype"] for result in report["results"]] == ["float32", "bfloat16"] * 3
    assert report["results"][0]["case"] == "decode 4/2×32 2×1/40"
    assert report["environment"]["torch"] == torch.__version__ and report["seed"] == 0
    for result in report["results"]:
        fastest = min(timing["median_s"] for timing in result["gather_and_sdpa"].values())
        assert result["speedup_over_gather_and_sdpa"] == pytest.approx(fastest / result["paged"]["median_s"])
        assert result["paged"]["min_s"] <= result["paged"]["median_s"] <= result["paged"]["max_s"]


def test_ops_table(run):
    status, out, _ = run(
        "bench", "ops", "--case", "2,4,2,32,40", "--rounds", "1", "--threads", "1", "--dtype", "float32"
    )
    assert status == 0
    assert "decode 4/2×32" in out and "1 threads" in out and "rounds 1, seed 0" in out


def test_bookkeeping(run):
    options = ("--batch", "3", "--layers", "2", "--context", "40", "--rounds", "40", "--block-size", "4")
    status, out, _ = run("bench", "bookkeeping", *options, "--json")
    report = json.loads(out)
    assert status == 0
    assert 0 < report["step"]["min_s"] <= report["step"]["median_s"] <= report["step"]["max_s"]
    assert (report["batch"], report["layers"], report["rounds"]) == (3, 2, 40)
    assert report["median_s_per_layer"] == report["step"]["median_s"] / 2
    status, out, _ = run("bench", "bookkeeping", *options)
    assert status == 0 and "batch 3, layers 2, context 40" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [MIXED, *(c for c in map(parse_case, ("2,6,2,16,33", "2,4,4,8,20,20")))], ids=str)
def test_every_way_computes_the_same(case, dtype):
    torch.manual_seed(0)
    inputs = Inputs.random(case, dtype, block_size=4, num_layers=2)
    ways = {"paged": attention_ways.paged(inputs)}
    for name, form in attention_ways.sdpa_forms(inputs).items():
        ways |= {f"gather {name}": attention_ways.gathered(inputs, form)}
        ways |= {f"contiguous {name}": attention_ways.contiguous(inputs, form)}
    require_agreement(case, ways, dtype)
    tokens = sum(case.query_lens)
    assert all(way(1).shape == (tokens, case.num_heads, case.head_dim) for way in ways.values())
    with pytest.raises(CommandError, match="broken differs from the paged op"):
        require_agreement(case, {**ways, "broken": lambda number: ways["paged"](number) + 1}, dtype)
    with pytest.raises(CommandError, match="broken differs from the paged op by nan"):
        require_agreement(case, {**ways, "broken": lambda number: ways["paged"](number) * torch.nan}, dtype)


def test_ways_alternate():
    calls = []
    timings = alternate({"a": lambda n: calls.append(f"a{n}"), "b": lambda n: calls.append(f"b{n}")}, rounds=2)
    assert calls == ["a-1", "b-1", "a0", "b0", "a1", "b1"]
    assert set(timings) == {"a", "b"}


def test_flops_and_bytes_of_a_case():
    case = Case("mixed", 4, 2, 8, (Group(2, 1, 10), Group(1, 3, 5)))
    visible = 2 * 10 + (3 + 4 + 5)
    assert case.flops() == visible * 4 * 8 * 2 * 2
    assert case.kv_bytes(torch.bfloat16) == (10 + 10 + 5) * 2 * 8 * 2 * 2


def test_cases_of_the_command_line():
    assert parse_case("8,32,8,128,2048") == DEFAULT_CASES[1]
    assert parse_case("1,32,8,128,512,512") == DEFAULT_CASES[4]
    assert parse_case("1,32,8,128,4096,256") == DEFAULT_CASES[6]


def test_layers_rotate_through_more_than_the_cache_but_not_through_all_memory():
    assert layers_to_rotate(1 << 40) == 1
    assert layers_to_rotate(1 << 20) * (1 << 20) >= 4 << 20
    assert layers_to_rotate(1) == 128
