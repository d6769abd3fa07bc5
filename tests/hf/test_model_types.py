"""Every causal model type of transformers runs as docs/model_types.md says, with stock's tokens and logits."""

from __future__ import annotations

from collections import Counter

import pytest

from torch_paged.hf.family import BY_INTERFACE, BY_PATCH, GATHERS, KEEPS_STOCK

from .causal_types import CAUSAL_TYPES
from .model_type_table import outcome, read

WRITE = "`python -m tests.hf.model_type_table` writes the table anew"


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_a_type_runs_as_the_table_says(model_type: str) -> None:
    seen, row = outcome(model_type), read().get(model_type)
    # Whether stock can build a type depends on packages that only it needs.
    assert seen == row or (row is not None and row.path == "not tried"), WRITE


def test_the_table_has_every_type() -> None:
    assert set(read()) == set(CAUSAL_TYPES), WRITE


def test_at_least_150_types_give_stocks_tokens_on_blocks() -> None:
    paths = Counter(row.path for row in read().values())
    assert paths["native"] + paths["gathered"] >= 150
    assert paths["native"] >= 125


def test_every_type_that_is_called_native_was_seen_to_be() -> None:
    """Parts of a composite type stand in the list under a name that only their own config has."""
    native = {model_type for model_type, row in read().items() if row.path == "native"}
    assert native | {"emu3_text_model"} == BY_INTERFACE | BY_PATCH


@pytest.mark.parametrize("reasons, path", [(GATHERS, "gathered"), (KEEPS_STOCK, "stock's cache")])
def test_every_type_that_has_a_reason_was_seen_to_need_it(reasons: dict[str, str], path: str) -> None:
    seen = {model_type for model_type, row in read().items() if row.path == path}
    assert {model_type for types in reasons.values() for model_type in types.split()} <= seen | {"mllama_text_model"}
