"""The examples run as a user would run them: as scripts, from another folder, on the model in the package."""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
# Of the model in the package, in float32: keys and values of 5 layers, 2 heads of 32.
KIB_PER_TOKEN, KIB_PER_BLOCK = 2.5, 40


def run(example: str, *arguments: str, typed: str = "") -> str:
    """What the script prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, input=typed, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str, typed: str = "") -> None:
    """The script in this process, which has the libraries loaded."""
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")


def figures(pattern: str, text: str) -> list[list[float]]:
    """The numbers at each `#` of the pattern, wherever it occurs in the text."""
    regex = "".join({"#": r"(-?[\d,.]*\d)", " ": " +"}.get(letter, re.escape(letter)) for letter in pattern)
    return [[float(group.replace(",", "")) for group in match.groups()] for match in re.finditer(regex, text)]


def check_generate() -> None:
    out = run("generate", "--max-new-tokens", "12")
    assert "same tokens as stock: True" in out
    assert len(re.findall("^- ", out, re.MULTILINE)) == 3
    # Prompts of 2, 15 and 52 tokens, and the 11 that are fed back: 13, 26 and 63 tokens in 1 + 2 + 4 blocks.
    assert figures("paged: # KiB", out) == [[7 * KIB_PER_BLOCK]]
    assert figures("stock: # KiB", out) == [[pytest.approx(3 * 63 * KIB_PER_TOKEN, abs=0.5)]]


def check_many() -> None:
    out = run("many", "--requests", "7", "--at-once", "3")
    assert sorted(number for (number,) in figures("\n#: ", "\n" + out)) == list(range(7))
    [[finished, tokens, forwards]] = figures("# finished, # tokens in # forward passes", out)
    assert finished == 7 and forwards < tokens <= 10 + 15 + 20 + 25 + 10 + 15 + 20
    assert "\n0 blocks are still held" in out


def check_beams() -> None:
    out = run("beams", "--beams", "3", "--max-new-tokens", "20")
    assert "same tokens as stock: True" in out
    scores = [score for (score,) in figures("\n# ", "\n" + out)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    # 40 + 19 tokens a beam. The prompt fills 2 blocks, which all share; the beams part somewhere in the other 2.
    [[used, shared]] = figures("paged: # blocks at the end, # of them shared", out)
    assert 2 + 2 <= used <= 2 + 2 * 3 and shared >= 2
    [[paged]], [[stock]] = figures("paged: # KiB", out), figures("stock: # KiB", out)
    assert stock == pytest.approx(3 * 59 * KIB_PER_TOKEN, abs=0.5)
    assert used * KIB_PER_BLOCK <= paged < stock


def check_samples() -> None:
    out = run("samples", "--samples", "4", "--max-new-tokens", "10")
    assert "same tokens as stock: True" in out
    assert len(set(re.findall("^- .*", out, re.MULTILINE))) == 4
    # A prompt of 76 tokens: 4 blocks shared, and 12 + 9 tokens in 2 blocks of each sample's own.
    assert figures("paged: # KiB", out) == [[(4 + 4 * 2) * KIB_PER_BLOCK]]
    assert figures("paged: # blocks", out) == [[4]]
    assert figures("stock: # KiB", out) == [[4 * (76 + 9) * KIB_PER_TOKEN]]


def check_chat() -> None:
    out = run("chat", "--max-new-tokens", "6", typed="Call me Ishmael.\nThe whale is\nNow I must go.\n")
    answers = re.findall(r"> (.+)\n\[", out)
    turns = figures("[prefilled # of # tokens; the chat holds # blocks]", out)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32")
    text, computed = [], 0
    for line, answer, turn in zip(["Call me Ishmael.", "The whale is", "Now I must go."], answers, turns, strict=True):
        text += tokenizer(f" {line}")["input_ids"]
        # All but what the turns before computed: the line, and the answer's last token, which was not fed back.
        assert turn == [len(text) - computed, len(text), -(-(len(text) + 5) // 16)]
        computed = len(text) + 5
        inputs = tokenizer.pad({"input_ids": [text]}, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=6, repetition_penalty=1.3)[0, len(text) :].tolist()
        assert answer.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
        text += new


def check_stats() -> None:
    out = run("stats", "--samples", "3", "--max-new-tokens", "10")
    # Of 2 + 9 tokens, 3 rows of a block each; of 52 + 9 tokens, 3 blocks shared, and 4 + 9 tokens in one of each row.
    token = KIB_PER_TOKEN * 1024
    useful, stock = (3 * 11 + 48 + 3 * 13) * token, 6 * 61 * token
    assert figures("blocks_used # #", out) == [[9, 0]]
    assert figures("\nblocks_shared # #", out) == [[3, 0]]
    [[total, _]] = figures("blocks_total # #", out)
    assert figures("blocks_free # #", out) == [[total - 9, total]]
    assert figures("bytes_held # #", out) == [[9 * 16 * token, 0]]
    assert figures("bytes_useful # #", out) == [[useful, 0]]
    assert figures("peak_bytes # #", out) == [[9 * 16 * token, 9 * 16 * token]]
    assert figures("waste #% #%", out) == [[pytest.approx(100 * (1 - 120 / 144), abs=0.05), 0]]
    assert figures("bytes of stock #", out) == [[stock]]
    assert figures("waste of stock #%", out) == [[pytest.approx(100 * (1 - useful / stock), abs=0.05)]]


def check_lora() -> None:
    out = run("lora", "--steps", "10", "--max-new-tokens", "8")
    assert "disabled, same tokens as before: True" in out
    assert "hungry, same tokens as stock: True" in out
    lines = re.findall(r"^(\w+): +(.*) \[(\d+) KiB paged\]$", out, re.MULTILINE)
    texts = {name: text for name, text, _ in lines}
    assert texts["friendly"].startswith("The whale was a kind and gentle")
    assert texts["hungry"].startswith("The whale had eaten nothing")
    assert texts["base"] == texts["disabled"] not in (texts["friendly"], texts["hungry"])
    # 2 + 7 tokens in a block, whatever adapter is on; none in the pool once the model is stock's.
    assert {name: int(kib) for name, _, kib in lines} == dict.fromkeys(texts, KIB_PER_BLOCK) | {"stock": 0}


def check_rollouts() -> None:
    out = run("rollouts", "--steps", "6", "--samples", "8", "--max-new-tokens", "12", "--learning-rate", "1e-2")
    assert "same samples of the trained model as stock: True" in out
    steps = figures("step #: reward #, # KiB of KV while sampling, # before backward", out)
    assert [step for step, *_ in steps] == list(range(6))
    # 17 + 11 tokens: a block that all share and one of each sample's own; none once generate has returned.
    assert all(memory == [9 * KIB_PER_BLOCK, 0] for _, _, *memory in steps)
    assert steps[-1][1] > 1.5 * steps[0][1]


def check_custom_model() -> None:
    assert run("custom_model").startswith("118 tokens of 3 sequences in 9 blocks of 16\n")


def check_compile() -> None:
    out = run("compile")
    assert "same tokens: True" in out


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("example", SCRIPTS)
def test_prints_what_holds(example: str) -> None:
    assert example in CHECKS, f"examples/{example}.py needs a check_{example} here"
    CHECKS[example]()


def test_chat_through_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Turns extend the text that is cached; where the template rewrites it, the whole of it is computed anew."""
    shutil.copytree(DEMO_MODEL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages | length > 3 %}Well.\n{% endif %}"
        "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}assistant:"
    )
    run_here(monkeypatch, "chat", "--model", str(tmp_path), "--max-new-tokens", "6", typed="Hear!\nSee!\nGo!\n\n")
    (first, second, third) = figures("[prefilled # of # tokens;", capsys.readouterr().out)
    assert first[0] == first[1]
    assert second[0] == second[1] - first[1] - 5
    assert third[0] == third[1]


@pytest.mark.parametrize("option, value", [("--model", "/no/such/folder"), ("--max-new-tokens", "0"), ("--what", "1")])
@pytest.mark.parametrize("example", SCRIPTS)
def test_wrong_arguments_are_one_line(
    example: str, option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, example, option, value)
    assert stop.value.code == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: ") and error.startswith(f"{example}.py: error: ") and option in error
