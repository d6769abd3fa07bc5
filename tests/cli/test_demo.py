"""demo: four uses of generate, stock and paged, on the packaged model."""

import json
import shutil

import pytest
import torch

from torch_paged.cli import demo
from torch_paged.cli.demo_workloads import _count_until_end, workloads

NEW = 6


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run for all tests that read its JSON."""
    from contextlib import redirect_stdout
    from io import StringIO

    from torch_paged.cli.main import main

    with redirect_stdout(StringIO()) as out:
        assert main(["demo", "--max-new-tokens", str(NEW), "--batch", "3", "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def model():
    return demo.load(None, torch.float32, torch.device("cpu"))


def test_tokens_are_stocks(report):
    assert [result["workload"] for result in report["results"]] == [
        "single prompt",
        "ragged batch of 3",
        "4 beams",
        "8 samples",
    ]
    assert all(result["same_tokens"] for result in report["results"])
    assert all(result["texts"]["stock"] == result["texts"]["paged"] for result in report["results"])
    assert [len(result["texts"]["stock"]) for result in report["results"]] == [1, 3, 1, 8]


def test_stock_bytes_are_those_of_its_padded_rows(report, model):
    model, tokenizer = model
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for workload, result in zip(workloads(list(demo.PROMPTS), 3), report["results"], strict=True):
        longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in workload.prompts)
        rows = {"4 beams": 4, "8 samples": 8}.get(workload.name, len(workload.prompts))
        # The last token is generated, not stored.
        assert result["peak_kv_bytes"]["stock"] == rows * (longest + NEW - 1) * per_token


def test_paged_holds_less_and_shares_the_prompt(report):
    single, ragged, beams, samples = report["results"]
    assert single["blocks_shared"] == ragged["blocks_shared"] == 0
    assert beams["blocks_shared"] > 0 and samples["blocks_shared"] > 0
    for result in (ragged, beams, samples):
        assert result["peak_kv_bytes"]["paged"] < result["peak_kv_bytes"]["stock"]
        assert 0 < result["waste"]["paged"] < result["waste"]["stock"] < 1


def test_table_and_own_model_and_prompts(run):
    arguments = ("--model", str(demo.PACKAGED_MODEL), "--prompt", "Once", "The sea was", "--batch", "3")
    status, out, _ = run("demo", *arguments, "--max-new-tokens", "3", "--threads", "1")
    assert status == 0
    assert "Once" in out and "ragged batch of 3" in out and "dtype float32, device cpu" in out
    assert out.count("│ yes ") == 4


def test_bfloat16_runs(run):
    status, out, _ = run("demo", "--dtype", "bfloat16", "--max-new-tokens", "2", "--batch", "1", "--json")
    assert status == 0
    bytes_held = [result["peak_kv_bytes"]["stock"] for result in json.loads(out)["results"]]
    assert bytes_held[0] == bytes_held[1]


def test_few_prompts_fill_a_ragged_batch_shortened():
    assert workloads(["a b c d", "e f"], 5)[1].prompts == ["a b c d", "e f", "a b", "e", "a"]


@pytest.mark.parametrize("end, count", [(None, 8), (1, 5), ([1, 3], 4)])
def test_new_tokens_end_with_the_end_token(end, count):
    new = torch.tensor([[5, 1, 0, 0], [6, 3, 1, 0]])
    assert _count_until_end(new, end) == count


def test_a_difference_is_shown(model, capsys):
    model, tokenizer = model
    (comparison, *_) = demo.compare_all(model, tokenizer, ["The"], batch=1, max_new_tokens=2)
    comparison.paged.tokens[0, -1] += 1
    demo.print_comparisons([comparison], {})
    out = capsys.readouterr().out
    assert "│ NO " in out and "stock: The" in out and "paged: The" in out
    assert not comparison.as_json()["same_tokens"]


def test_broken_model_folders_are_one_line(run, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(demo.PACKAGED_MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = run("demo", "--model", str(folder))
    assert status == 2 and err.count("\n") == 1 and f"--model {folder}: " in err
    (folder / "tokenizer.json").unlink()
    status, _, err = run("demo", "--model", str(folder))
    assert status == 2 and err.count("\n") == 1 and f"--model {folder}: " in err


def test_without_transformers(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run("demo")
    assert status == 2
    assert "transformers is not installed; run `pip install transformers`" in err and err.count("\n") == 1
