"""The judge itself, over a checkout in miniature: what it patches, what it runs, what it complains of."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

import torch_paged

from . import fetch, upstream
from .families import FAMILIES, ModelTester, config_of
from .judge import KNOBS, Outcome, Report, families, judge
from .ledger import LEDGER, Excuse
from .patched import every_model_patched

COMMON = """
import random
from .generation.test_utils import GenerationTesterMixin
global_rng = random.Random()
class ModelTesterMixin:
    def test_skips(self):
        self.skipTest("not today")
"""
GENERATION = """
import unittest
class GenerationTesterMixin:
    def test_generates(self):
        model = self.model_class(self.config)
        assert model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 4)
class UtilsTest(unittest.TestCase):
    def test_anything(self):
        pass
"""
LLAMA = """
import unittest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ...test_modeling_common import GenerationTesterMixin, ModelTesterMixin, global_rng
from ...test_modeling_common import GenerationTesterMixin as Imported
kept, drawn = [], []
class LlamaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_class = LlamaForCausalLM
    def setUp(self):
        self.config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    def test_draws_the_same_numbers_twice(self):
        drawn.append((float(torch.rand(1)), global_rng.random()))
        assert len(set(drawn)) == 1
    def test_fails_stock(self):
        assert False
    def test_keeps_a_cache(self):
        model = LlamaForCausalLM(self.config)
        kept.append(model.generate(max_new_tokens=3, return_dict_in_generate=True))
    def test_skips_patched(self):
        if type(LlamaForCausalLM(self.config)) is not LlamaForCausalLM:
            self.skipTest("patched")
    def test_wants_the_stock_class(self):
        assert type(LlamaForCausalLM(self.config)) is LlamaForCausalLM
class LlamaIntegrationTest(unittest.TestCase):
    def test_loads_from_the_hub(self):
        assert False
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    files = {
        "src/transformers/__init__.py": f'__version__ = "{transformers.__version__}"\n',
        "tests/test_modeling_common.py": COMMON,
        "tests/generation/test_utils.py": GENERATION,
        "tests/models/llama/test_modeling_llama.py": LLAMA,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(fetch.VARIABLE, str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == upstream.PACKAGE]:
        del sys.modules[name]


def test_a_checkout_brings_its_own_tests(checkout: Path) -> None:
    assert fetch.obstacle(transformers.__version__) is None and fetch.is_checkout(checkout)
    assert families() == ["executorch", "generation", "llama"]
    assert [outcome.test for outcome in judge("generation").outcomes] == ["UtilsTest.test_anything"]


def test_each_test_runs_stock_and_then_patched(checkout: Path) -> None:
    report = judge("llama")
    results = {one.test.removeprefix("LlamaModelTest.test_"): (one.stock, one.patched) for one in report.outcomes}
    assert results == {
        "draws_the_same_numbers_twice": ("passed", "passed"),
        "fails_stock": ("failed", None),
        "generates": ("passed", "passed"),
        "keeps_a_cache": ("passed", "passed"),
        "skips": ("skipped", None),
        "skips_patched": ("passed", "skipped"),
        "wants_the_stock_class": ("passed", "failed"),
    }  # fmt: skip
    assert (report.models, report.paged) == (4, 2)
    # One row of 4 columns, the last of which is not stored: a block.
    assert report.blocks == 1
    complaints = [complaint.splitlines()[0] for complaint in report.complaints([])]
    assert complaints == [
        "LlamaModelTest.test_skips_patched: passed stock, skipped patched",
        "LlamaModelTest.test_wants_the_stock_class: passed stock, failed patched",
        "1 blocks are still held after all tests",
    ]


EXCUSES = [Excuse("test_wants_*", "the class is ours"), Excuse("test_generates", "never", families=("gpt2",))]


@pytest.mark.parametrize(
    ("outcome", "family", "complaint", "number"),
    [
        (Outcome("A.test_generates", "passed", "passed", ""), "llama", None, "passed both"),
        (Outcome("A.test_generates", "passed", "failed", "boom"), "llama", "boom", "failed patched"),
        (Outcome("A.test_generates", "passed", "failed", "boom"), "gpt2", None, "in the ledger"),
        (Outcome("A.test_generates", "passed", "passed", ""), "gpt2", "strike it", "passed both"),
        (Outcome("A.test_wants_0_fp16", "passed", "failed", "boom"), "llama", None, "in the ledger"),
        (Outcome("A.test_wants_0_fp16", "skipped", None, ""), "llama", None, "skipped stock"),
        (Outcome("A.test_generates", "failed", None, "boom"), "llama", None, "failed stock"),
    ],
)
def test_the_ledger_excuses_what_it_names_and_no_more(
    outcome: Outcome, family: str, complaint: str | None, number: str
) -> None:
    report = Report(family, [outcome])
    found = report.complaints(EXCUSES)
    assert (complaint in found[0] if complaint else not found) and report.tally(EXCUSES) == {number: 1}


def test_the_ledger_names_families_that_there_are() -> None:
    for excuse in LEDGER:
        assert excuse.reason and set(excuse.families) <= {*FAMILIES, "executorch", "generation"}


def _by_class(folder: Path) -> Any:
    return LlamaForCausalLM(config_of("llama"))


def _from_config(folder: Path) -> Any:
    return AutoModelForCausalLM.from_config(config_of("llama"))


def _from_pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def _with_loading_info(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)[0]


@pytest.mark.parametrize("build", [_by_class, _from_config, _from_pretrained, _with_loading_info])
def test_every_model_is_patched_once(build: Any, tmp_path: Path) -> None:
    LlamaForCausalLM(config_of("llama")).save_pretrained(tmp_path)
    with every_model_patched(**KNOBS) as handles:
        model = build(tmp_path)
        (handle,) = handles
        assert torch_paged.patch(model, **KNOBS) is handle and handle.config.block_size == 4
        LlamaModel(config_of("llama"))
        assert len(handles) == 1
    assert type(build(tmp_path)) is LlamaForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_tiny_models_that_generate(family: str) -> None:
    tester = ModelTester(family)
    assert tester.causal_lm_class.can_generate() and tester.get_config().num_hidden_layers == tester.num_hidden_layers


def test_an_sdist_is_unpacked_to_its_tests(tmp_path: Path) -> None:
    version = fetch.pinned_version()
    content = tmp_path / f"transformers-{version}"
    for name in ("tests/test_a.py", "src/transformers/__init__.py", "src/transformers/models.py", "setup.py"):
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_text(f'__version__ = "{version}"\n')
    archive = tmp_path / "sdist.tar.gz"
    with tarfile.open(archive, "w:gz") as sdist:
        sdist.add(content, content.name)
        sdist.add(content / "setup.py", f"{content.name}/tests/../../outside.py")
    folder = tmp_path / "unpacked"
    fetch.unpack(archive, folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"tests/test_a.py", "src/transformers/__init__.py"} and fetch.version_of(folder) == version
    assert not (tmp_path / "outside.py").exists()


def test_what_stands_in_the_way_is_said_with_what_to_do(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install" in str(fetch.obstacle("5.0.0"))
    (checkout / "tests" / "test_modeling_common.py").unlink()
    assert f"{fetch.VARIABLE}={checkout}" in str(fetch.obstacle(transformers.__version__))
    monkeypatch.delenv(fetch.VARIABLE)

    assert fetch.source().name == f"transformers-{fetch.pinned_version()}"
    monkeypatch.setattr(fetch, "source", lambda: checkout / "nothing")
    assert fetch.COMMAND in str(fetch.obstacle(transformers.__version__))
