"""env: the whole installation, as lines and as JSON."""

import json
import sys

import torch
import transformers

import torch_paged


def test_json_names_versions_and_the_instruction_set_in_use(run):
    status, out, _ = run("env", "--json")
    environment = json.loads(out)
    assert status == 0
    assert environment["torch_paged"] == torch_paged.__version__
    assert environment["torch"] == torch.__version__
    assert environment["transformers"] == transformers.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu_instruction_set"] in environment["cpu_instruction_sets"]
    assert len(environment["gpus"]) == torch.cuda.device_count()
    assert all(isinstance(has, bool) for has in environment["transformers_features"].values())


def test_lines_hold_what_the_json_holds(run):
    environment = json.loads(run("env", "--json")[1])
    lines = run("env")[1].splitlines()
    assert [line.split("  ")[0] for line in lines] == [name.replace("_", " ") for name in environment]
    assert lines[1].endswith(torch.__version__)


def test_works_without_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_paged.hf.features", None)
    status, out, _ = run("env")
    assert status == 0
    assert out.splitlines()[-1].split() == ["transformers", "features", "none"]
