"""The table docs/model_types.md: every causal model type, how it runs while patched, and why.

`python -m tests.hf.model_type_table` writes it anew, test_model_types.py holds it against what the models do.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.progress import track

import torch_paged

from .causal_types import CAUSAL_TYPES, WINDOW, tiny_causal
from .counting import count_calls
from .models import PAD, VOCAB

FILE = Path(__file__).parents[2] / "docs" / "model_types.md"
ROW = re.compile(r"^\| `(?P<type>[^`]+)` \| (?P<path>[a-z' ]+) \| (?P<reason>.*) \|$")
HEAD = """# Model types

How `model.generate` runs on a patched model, for every causal type of transformers {version}: {counts}.
Written by `python -m tests.hf.model_type_table` from small random models in float32, each run stock and patched over
a left-padded batch that is longer than its windows: the same tokens, and logits that agree. A test holds every row
against what the models do. Encoder-decoder types stand here with their decoder alone, as `AutoModelForCausalLM` makes
it; the full models (BART, Whisper ...) gather.

- **native**: attention reads the blocks in place.
- **gathered**: KV is stored in blocks and gathered for the model's own attention in every layer and step; a warning
  tells the reason.
- **stock's cache**: nothing is paged; a warning tells the reason.
- **not tried**: stock transformers does not build or run the type from a small config of its own class; what it says
  stands beside it.

| type | path | reason |
|---|---|---|
"""


class Outcome(NamedTuple):
    path: str
    reason: str


def outcome(model_type: str) -> Outcome:
    """What `generate` does with a tiny model of this type while it is patched.

    Raises:
        AssertionError: it gives other tokens or logits than stock's.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, VOCAB - 1, (2, WINDOW + 6), generator=generator)
    mask = torch.ones_like(prompt)
    prompt[1, :5], mask[1, :5] = PAD, 0
    arguments = dict(
        input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    try:
        model = tiny_causal(model_type)
        expected = model.generate(**arguments)
    except Exception as error:
        # The last line of a validation error names the problem, the first sentence of any other one does.
        text = str(error).strip().splitlines()[-1].partition(". ")[0].strip()
        return Outcome("not tried", f"{type(error).__name__}: {text}".replace("|", "/"))
    with _Warnings() as said, torch_paged.paged(model, block_size=4, max_memory="64MiB"), count_calls() as calls:
        actual = model.generate(**arguments)
    _assert_same(expected, actual, prompt.shape[1])
    reason = "; ".join(message.partition(": ")[2].rpartition("; ")[0] for message in said.messages)
    if calls["gather"]:
        return Outcome("gathered", reason)
    return Outcome("native" if calls["paged.attention"] else "stock's cache", reason)


def read() -> dict[str, Outcome]:
    """The rows of the table."""
    rows = (ROW.match(line) for line in FILE.read_text().splitlines())
    return {row["type"]: Outcome(row["path"], row["reason"]) for row in rows if row}


def _assert_same(expected: object, actual: object, prompt: int) -> None:
    """Logits agree, and tokens do, but after a step where stock's two best logits lie closer than 1e-5."""
    width = len(expected.logits)
    for row in range(len(expected.sequences)):
        for step in range(width):
            want, got = expected.logits[step][row], actual.logits[step][row]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            if expected.sequences[row, prompt + step] != actual.sequences[row, prompt + step]:
                best = want.topk(2).values
                assert float(best[0] - best[1]) < 1e-5, f"row {row}, step {step}: another token"
                break


class _Warnings(logging.Handler):
    """What our logger says in a `with` block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger("torch_paged").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("torch_paged").removeHandler(self)


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {model_type: outcome(model_type) for model_type in track(sorted(CAUSAL_TYPES))}
    counts = Counter(row.path for row in rows.values())
    head = HEAD.format(
        version=version("transformers"), counts=", ".join(f"{n} {path}" for path, n in counts.most_common())
    )
    lines = [f"| `{model_type}` | {row.path} | {row.reason} |" for model_type, row in rows.items()]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
