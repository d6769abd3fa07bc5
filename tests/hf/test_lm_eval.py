"""lm-eval's HFLM over a patched model: the scores of stock, on a task made of local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import torch_paged

from .counting import count_calls
from .models import VOCAB, tiny, tiny_tokenizer, twin

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'torch_paged[dev]'")

GENERATE = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answers.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["K"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/answers.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["A", "BCD", "EF"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def evaluate(model: PreTrainedModel, folder: Path) -> Any:
    from lm_eval import tasks as task_files
    from lm_eval.models import huggingface

    tokenizer = tiny_tokenizer()
    language_model = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=128)
    # Only where the task's own folder is named does it look nowhere else.
    tasks = task_files.TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        language_model, tasks=["answers", "choices"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = {name: [sample["resps"] for sample in each] for name, each in found["samples"].items()}
    return found["results"], samples


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("answers", GENERATE), ("choices", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    letters = [chr(33 + number) for number in range(1, 90)]
    questions = ["".join(letters[(7 * i + j * j) % 89] for j in range(5 + 6 * i)) for i in range(7)]
    documents = [{"question": question, "answer": "A"} for question in questions]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_scores_are_those_of_stock(name: str, tasks: Path) -> None:
    stock = tiny(name)
    model = twin(stock)
    expected = evaluate(stock, tasks)
    handle = torch_paged.patch(model, block_size=4, prefix_caching=True)
    with count_calls() as calls:
        actual = evaluate(model, tasks)
    assert calls["paged.attention"] > 0 == calls["gather"]
    assert actual == expected
    answers = [resps for resps in expected[1]["answers"]]
    assert len({str(answer) for answer in answers}) > 1, f"answers of {VOCAB} letters that differ"
    assert handle.stats().blocks_used == handle.stats().blocks_cached
