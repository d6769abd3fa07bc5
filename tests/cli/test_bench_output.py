"""Where a bench writes: a table, JSON to a file or to stdout, a picture, and one line where that cannot be."""

import json
import struct
import sys

import pytest

from torch_paged.cli.bench import copies

BOOKKEEPING = ("bench", "bookkeeping", "--batch", "2", "--layers", "1", "--context", "9", "--rounds", "3")
MEMORY = ("bench", "memory", "--requests", "3", "--rounds", "1", "--max-len", "64", "--widths", "2")
OPS = ("bench", "ops", "--shape", "1,2,2,8,9", "--dtype", "float32", "--rounds", "1")
GENERATE = ("bench", "generate", "--layers=1", "--hidden=16", "--heads=2", "--intermediate=16", "--vocabulary=50")
GENERATE += ("--context=9", "--new-tokens=3", "--cases=one", "--ways", "dynamic", "paged", "--rounds", "1")
COPIES = ("bench", "copies", "--tokens", "8", "--block-size", "1", "--dtype", "bfloat16", "--rounds", "1")
SUBJECTS = [BOOKKEEPING, MEMORY, OPS, COPIES, GENERATE]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A last-level cache that small tensors exceed."""
    monkeypatch.setattr(copies, "last_level_cache_bytes", lambda: 4096)


every_subject = pytest.mark.parametrize("command", SUBJECTS, ids=lambda command: command[1])


@every_subject
def test_json_file_stands_beside_the_table(run, tmp_path, command):
    file = tmp_path / "figures.json"
    status, out, _ = run(*command, "--json", str(file), "--threads", "1", "--seed", "7")
    report = json.loads(file.read_text())
    assert status == 0 and "seed 7" in out and "1 threads" in out
    assert (report["bench"], report["seed"], report["environment"]["threads"]) == (command[1], 7, 1)
    assert report["rounds"] == int(command[command.index("--rounds") + 1])
    assert report["environment"]["cpu"] in out and report["environment"]["cpu_instruction_set"] in out


@every_subject
def test_json_on_stdout_stands_alone(run, command):
    plain, dash = (json.loads(run(*command, "--json", *where)[1]) for where in ((), ("-",)))
    assert plain.keys() == dash.keys()


@every_subject
def test_plot_is_a_picture(run, tmp_path, command):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'torch_paged[bench]'")
    file = tmp_path / "figures.png"
    assert run(*command, "--plot", str(file))[0] == 0
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and width > 500 and height > 200
    assert data.endswith(b"IEND\xaeB`\x82")


def test_plot_with_another_ending_gets_one_line(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'torch_paged[bench]'")
    status, out, err = run(*BOOKKEEPING, "--plot", str(tmp_path / "figures.doc"))
    assert (status, out) == (2, "") and "figures.doc: must end in one of ." in err and err.count("\n") == 1


@every_subject
def test_plot_without_matplotlib_gets_one_line(run, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, out, err = run(*command, "--plot", str(tmp_path / "figures.png"))
    assert (status, out) == (2, "")
    assert "matplotlib is not installed; run `pip install 'torch_paged[bench]'`" in err and err.count("\n") == 1


def test_memory_needs_no_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(*MEMORY)[0] == 0
