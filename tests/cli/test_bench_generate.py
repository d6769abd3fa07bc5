"""bench generate: the same tokens in every way, and KV bytes as counted by hand."""

import json

import pytest
import torch

from tests.hf.graphs import Graphs, fresh_dynamo
from torch_paged import PagedConfig
from torch_paged.cli.bench import generate_ways
from torch_paged.cli.bench.generate_cases import NAMES, GenerateCase, Sizes, cases
from torch_paged.cli.bench.generate_result import CaseResult, WayResult, notes, table
from torch_paged.cli.bench.generate_ways import Run, _Clock
from torch_paged.cli.demo import PACKAGED_MODEL

SIZES = Sizes(
    context=20,
    new_tokens=5,
    batches=(2, 3),
    beams=3,
    samples=4,
    ragged_rows=6,
    ragged_prompts=(3, 30),
    ragged_wishes=(2, 7),
    chat_system=30,
    chat_turns=3,
    chat_user=6,
    chat_answer=5,
    many_requests=9,
    many_fit=2,
    many_prompts=(3, 30),
    many_wishes=(2, 7),
)
SMALL = ("--layers=2", "--hidden=32", "--intermediate=48", "--heads=4", "--kv-heads=2", "--vocabulary=200")
QUICK = ("--context=20", "--new-tokens=5", "--batch=3", "--beams=3", "--samples=4", "--block-size=4", "--rounds=1")
CHAT = ("--chat-system=30", "--chat-turns=3", "--chat-user=6", "--chat-answer=5")
RAGGED = ("--ragged-rows=4", "--ragged-prompts", "3", "30", "--ragged-wishes", "2", "7")
MANY = ("--many-requests=9", "--many-fit=2", "--many-prompts", "3", "30", "--many-wishes", "2", "7")
WAYS = ("dynamic", "one-by-one", "static", "paged", "slots", "blocks")
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, float32
PAGE_BYTES = 256 * TOKEN_BYTES


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run of every case for all tests that read its JSON; continuous batching has a test of its own."""
    return run_json(tmp_path_factory.mktemp("bench"), "--ways", *WAYS)


def run_json(folder, *options):
    from torch_paged.cli.main import main

    torch.set_num_threads(1)
    file = folder / "generate.json"
    assert main(["bench", "generate", *SMALL, *QUICK, *RAGGED, *CHAT, *MANY, *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def by_name(report):
    return dict(zip(NAMES, report["results"], strict=True))


def test_every_way_gives_stocks_tokens(report):
    for result in report["results"]:
        ragged = result["case"].startswith("ragged") or result["case"] == "3 x 10-20"
        names = ["DynamicCache", *["DynamicCache, one by one"] * ragged, "StaticCache", "torch_paged"]
        if "requests" in result["case"]:
            names = ["generate_many by slots", "generate_many by blocks"]
        assert list(result["ways"]) == names
        for way in result["ways"].values():
            assert way["same_tokens"] is True
            assert way["sequences_with_same_tokens"] == result["sequences"]


def test_json_names_the_machine_and_every_figure(report):
    assert report["bench"] == "generate" and report["model"].startswith("random 2x32, 4/2 heads")
    assert {"cpu", "cpu_instruction_set", "threads", "torch", "transformers"} <= set(report["environment"])
    assert (report["seed"], report["rounds"], report["block_size"]) == (0, 1, 4)
    for result in report["results"][:-1]:
        for name, way in result["ways"].items():
            for timing in (way["step"], way["prefill"], way["total"]):
                assert 0 < timing["min_s"] <= timing["median_s"] <= timing["max_s"]
            assert way["prefill"]["median_s"] < way["total"]["median_s"]
            assert way["new_tokens_per_s"] == pytest.approx(result["new_tokens"] / way["total"]["median_s"])
            stock = result["ways"]["DynamicCache"]
            assert way["total_speedup_over_dynamic"] == stock["total"]["median_s"] / way["total"]["median_s"]
            assert (way["step_speedup_over_dynamic"] is None) == (name == "DynamicCache, one by one")


def test_kv_bytes_by_hand(report):
    found = {
        case: {name: way["peak_kv_bytes"] for name, way in result["ways"].items()}
        for case, result in by_name(report).items()
    }
    stored = 20 + 5 - 1  # the last token is generated, not stored
    for case, rows in (("one", 1), ("uniform", 3), ("beams", 3), ("samples", 4)):
        assert found[case]["DynamicCache"] == found[case]["StaticCache"] == rows * stored * TOKEN_BYTES
    block = 4 * TOKEN_BYTES
    assert found["one"]["torch_paged"] == 6 * block
    assert found["uniform"]["torch_paged"] == 3 * 6 * block
    # The prompt fills five blocks; each sample has its own sixth.
    assert found["samples"]["torch_paged"] == (5 + 4) * block
    assert 6 * block < found["beams"]["torch_paged"] <= (5 + 3) * block


def test_a_compiled_way_compiles_before_it_is_timed(tmp_path, monkeypatch):
    graphs, compiled = Graphs(), []

    class Noting(_Clock):
        def __init__(self, *args):
            super().__init__(*args)
            compiled.append(graphs.compiled)

    monkeypatch.setattr(generate_ways, "_Clock", Noting)
    monkeypatch.setattr(PagedConfig, "compile_options", {"backend": graphs})
    with fresh_dynamo():
        report = run_json(tmp_path, "--ways", "dynamic", "paged-compiled", "--cases", "ragged", "--rounds", "2")
    (result,) = report["results"]
    ours = result["ways"]["torch_paged, compile=True"]
    assert ours["same_tokens"] is True and ours["prefill_tokens"] == result["prompt_tokens"]
    # A call of stock's, then of ours: steps of several rows in the first, a prefill in the second, steps of a row in
    # the third, and nothing in the two rounds of both.
    assert compiled == [0, 0, 1, 2, 3, 3, 3, 3] and graphs.compiled == 3
    assert ours["warm_up_s"] > 0 and graphs.runs > 0


def test_a_chat_over_a_system_prompt_computes_it_once(report):
    found = {name: way["prefill_tokens"] for name, way in by_name(report)["chat"]["ways"].items()}
    said = [36, 36 + 11, 36 + 22]
    assert found["DynamicCache"] == found["StaticCache"] == sum(said)
    # Of 36 + 5 - 1 and 47 + 5 - 1 tokens the full blocks of 4 are remembered.
    assert found["torch_paged"] == 36 + (47 - 40) + (58 - 48)
    assert by_name(report)["chat"]["new_tokens"] == 15


def test_kv_bytes_of_ragged_rows_by_hand(report):
    (case,) = cases(["ragged"], Sizes(**{**vars(SIZES), "ragged_rows": 4}), 200, 0)
    found = by_name(report)["ragged"]["ways"]
    assert by_name(report)["ragged"]["prompt_tokens"] == sum(map(len, case.prompts))
    longest, wish = max(map(len, case.prompts)), max(case.wishes)
    assert found["DynamicCache"]["peak_kv_bytes"] == 4 * (longest + wish - 1) * TOKEN_BYTES
    alone = [len(prompt) + wish - 1 for prompt, wish in zip(case.prompts, case.wishes, strict=True)]
    assert found["DynamicCache, one by one"]["peak_kv_bytes"] == max(alone) * TOKEN_BYTES
    blocks = sum(-(-(len(prompt) + wish - 1) // 4) for prompt in case.prompts)
    assert found["torch_paged"]["peak_kv_bytes"] <= blocks * 4 * TOKEN_BYTES


def test_requests_that_do_not_fit_all_finish(report):
    (case,) = cases(["many"], SIZES, 200, 0)
    result = by_name(report)["many"]
    found = result["ways"]
    assert result["new_tokens"] == sum(case.wishes) and result["sequences"] == 9
    blocks = [-(-(len(prompt) + wish - 1) // 4) for prompt, wish in zip(case.prompts, case.wishes, strict=True)]
    by_slots, by_blocks = found["generate_many by slots"], found["generate_many by blocks"]
    # The pool has room for twice the mean.
    assert by_blocks["peak_kv_bytes"] <= max(-(-2 * sum(blocks) // 9), *blocks) * 4 * TOKEN_BYTES
    assert by_slots["peak_kv_bytes"] <= sum(sorted(blocks)[-2:]) * 4 * TOKEN_BYTES
    assert by_slots["prefill_tokens"] == sum(map(len, case.prompts)) == by_blocks["prefill_tokens"]
    assert by_slots["total_speedup_over_slots"] == 1.0
    ratio = by_slots["total"]["median_s"] / by_blocks["total"]["median_s"]
    assert by_blocks["total_speedup_over_slots"] == ratio


def test_a_request_that_fails_is_told(run, monkeypatch):
    from torch_paged.cli.bench import generate_many_ways

    monkeypatch.setattr(generate_many_ways, "pool_bytes", lambda *_: 2 * 4 * TOKEN_BYTES)
    status, out, _ = run("bench", "generate", *SMALL, *QUICK, *MANY, "--cases", "many")
    assert status == 0 and "generate_many by blocks: not run, a request did not finish: out of KV blocks" in out


def test_continuous_batching_runs_on_this_machine(tmp_path):
    report = run_json(tmp_path, "--ways", "dynamic", "batch", "--cases", "ragged", "beams", "samples")
    ragged, beams, samples = (result["ways"]["generate_batch"] for result in report["results"])
    assert ragged["same_tokens"] is True and ragged["sequences_with_same_tokens"] == 4
    assert ragged["peak_kv_bytes"] == 4 * PAGE_BYTES
    assert beams == {"not_run": "generate_batch has no beams"}
    # It draws other samples, in pages that no two of them share before a page is full.
    assert samples["same_tokens"] is None and samples["peak_kv_bytes"] == 4 * PAGE_BYTES


def test_what_does_not_run_here_is_told(run, monkeypatch):
    from transformers import Qwen2ForCausalLM

    def refuse(*args, **kwargs):
        raise RuntimeError("no such\ndevice")

    monkeypatch.setattr(Qwen2ForCausalLM, "continuous_batching_context_manager", refuse)
    options = ("--ways", "batch", "paged", "--cases", "one", "--dtype", "bfloat16")
    status, out, _ = run("bench", "generate", *SMALL, *QUICK, *options)
    assert status == 0 and "not run" in out and "1 x 20, bfloat16, generate_batch: not run, no such device." in out
    assert "torch_paged" in out and "bfloat16" in out


def test_table_and_plot(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'torch_paged[bench]'")
    file = tmp_path / "generate.png"
    options = ("--cases", "one", "--ways", "dynamic", "paged", "--plot", str(file))
    status, out, _ = run("bench", "generate", *SMALL, *QUICK, *options)
    assert status == 0 and out.count("yes") == 2 and out.count(" 6 KiB ") == 2
    assert "model random 2x32" in out and "seed 0" in out
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_new_token_has_no_step(run):
    options = (*QUICK, "--new-tokens", "1", "--cases", "one", "--ways", "dynamic", "paged", "--json")
    status, out, _ = run("bench", "generate", *SMALL, *options)
    (result,) = json.loads(out)["results"]
    assert status == 0 and result["ways"]["torch_paged"]["step"] is None


def test_named_model(run):
    options = ("--model", str(PACKAGED_MODEL), "--cases", "uniform", "--ways", "dynamic", "paged")
    status, out, _ = run("bench", "generate", *QUICK, *options, "--json")
    report = json.loads(out)
    assert status == 0 and report["model"] == str(PACKAGED_MODEL)
    assert report["results"][0]["ways"]["torch_paged"]["same_tokens"] is True
    # None of its rows ended early: the packaged model has a token for the end.
    assert report["results"][0]["new_tokens"] == 15


def test_cases_are_what_their_names_say():
    asked = cases(list(NAMES), SIZES, vocabulary=50, seed=0)
    lengths = {case.name: [len(prompt) for prompt in case.prompts] for case in asked}
    assert list(lengths)[:5] == ["1 x 20", "2 x 20", "3 x 20", "2 x 10-20", "3 x 10-20"]
    assert lengths["3 x 20"] == [20, 20, 20]
    assert lengths["3 x 10-20"][0] == 20 and all(10 <= length <= 20 for length in lengths["3 x 10-20"])
    ragged = asked[5]
    assert len(ragged.prompts) == 6 and all(3 <= len(prompt) <= 30 for prompt in ragged.prompts)
    assert all(2 <= wish <= 7 for wish in ragged.wishes) and ragged.useful_tokens == sum(ragged.wishes)
    assert [case.rows for case in asked] == [1, 2, 3, 2, 3, 6, 3, 4, 1, 9]
    chat = asked[-2]
    assert (len(chat.prompts[0]), [len(turn) for turn in chat.turns], chat.wishes) == (36, [6, 6], [5])
    assert chat.useful_tokens == 15
    assert [case.is_ragged for case in asked] == [False] * 3 + [True] * 3 + [False] * 3 + [True]
    assert asked[-1].fit == 2 and asked[-1].shortened(4, 3).fit == 2
    assert all(1 <= token < 50 for case in asked for prompt in case.prompts for token in prompt)
    # A case is the same whichever others are asked for, and another with another seed.
    assert cases(["ragged"], SIZES, 50, 0) == [ragged] != cases(["ragged"], SIZES, 50, 1)
    assert SIZES.positions(["one"]) == 25 and SIZES.positions(list(NAMES)) == 63
    short = ragged.shortened(4, 3)
    assert max(map(len, short.prompts)) == 4 and max(short.wishes) == 3


def test_rows_end_with_their_wishes():
    clock = _Clock(GenerateCase("two", [[1, 2, 3], [4]], [1, 3]), width=3, start=0.0, computed=lambda: 7)
    assert [clock(torch.ones(2, 3 + step), None).tolist() for step in (1, 2, 3)] == [[1, 0], [1, 0], [1, 1]]
    # Beams are more rows than prompts; max_new_tokens ends them.
    beams = _Clock(
        GenerateCase("beams", [[1, 2, 3]], [1], options={"num_beams": 2}), width=3, start=0.0, computed=lambda: 3
    )
    assert beams(torch.ones(2, 4), None).tolist() == [0, 0]
    assert clock.prefill_tokens == 7 and len(clock.marks) == 3 and clock.marks == sorted(clock.marks)


def test_a_difference_is_shown():
    def result(name, tokens, **kind):
        return WayResult(name, runs=[Run(tokens, [0.5, 0.75, 1.25], 2.0, 1 << 20)], **kind)

    case = GenerateCase("two", [[1], [2]], [3, 3])
    stock, ours = result("DynamicCache", [[1, 2, 3], [4, 5, 6]]), result("torch_paged", [[1, 2, 3], [4, 5, 7]])
    found = CaseResult(case, "float32", [stock, ours, WayResult("generate_batch", reason="why")])
    assert found.same_rows(stock) == 2 and found.same_rows(ours) == 1
    assert found.as_json()["ways"]["torch_paged"]["same_tokens"] is False
    assert "NO: 1 of 2" in list(table([found]).columns[-1].cells)
    assert notes([found])[-1] == "two, float32, generate_batch: not run, why."
    assert (ours.step.median, ours.step.fastest, ours.step.slowest) == (0.375, 0.25, 0.5)
    assert CaseResult(case, "bfloat16", [stock, ours]).same_rows(ours) is None
    samples = GenerateCase("samples", [[1]], [3], options={"do_sample": True, "num_return_sequences": 2})
    other = result("generate_batch", [[1, 2, 3], [4, 5, 7]], draws_alike=False)
    assert CaseResult(samples, "float32", [stock, other]).same_rows(other) is None
    assert CaseResult(case, "float32", [stock, other]).same_rows(other) == 1
