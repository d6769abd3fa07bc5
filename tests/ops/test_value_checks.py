"""Bad values of tables and slots are named on every backend: on a device by the kernels of TORCH_PAGED_CHECK=1."""

import pytest
import torch

from tests.assertions import assert_rejects
from tests.ops.test_attention_rejects import BAD_VALUES, few_tokens
from torch_paged import ops

OP = "attention"


@pytest.fixture(autouse=True)
def checks_values(monkeypatch):
    monkeypatch.setenv("TORCH_PAGED_CHECK", "1")


def moved(arguments, backend):
    return {name: a.to(backend) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_attention(backend, change, message):
    arguments = few_tokens([(1, 5), (2, 3)])
    ops.attention(**moved(arguments, backend))
    assert_rejects("attention", moved(arguments | change(arguments), backend), message)


@pytest.mark.parametrize(
    ("table", "seq_lens", "message"),
    [
        ([[0, 3]], [5], "block_table: value 3 at [0, 1]; must be in [0, 3)"),
        ([[0, 1]], [9], "seq_lens: value 9 at [0]; must be in [0, 8]"),
        ([[0, 1]], [7], "max_seq_len: 6; must be at least 7, the length of sequence 0"),
    ],
)
def test_gather_cache(backend, table, seq_lens, message):
    cache = torch.zeros(3, 4, 1, 8, device=backend)
    tables = {"key_cache": cache, "value_cache": cache, "max_seq_len": 6}
    tables |= {
        "block_table": torch.tensor(table).int().to(backend),
        "seq_lens": torch.tensor(seq_lens).int().to(backend),
    }
    assert_rejects("gather_cache", tables, message)


@pytest.mark.parametrize("slot", [-2, 12])
def test_reshape_and_cache(backend, slot):
    new, cache = torch.ones(1, 1, 8, device=backend), torch.zeros(3, 4, 1, 8, device=backend)
    slots = torch.tensor([slot], device=backend)
    arguments = {"key": new, "value": new, "key_cache": cache, "value_cache": cache.clone(), "slot_mapping": slots}
    message = f"slot_mapping: value {slot} at [0]; must be in [-1, 12)"
    assert_rejects("reshape_and_cache", arguments, message)
    assert_rejects("rope_and_cache", arguments | {"query": new, "cos": new[:, 0], "sin": new[:, 0]}, message)
    assert (cache == 0).all()


def test_copy_blocks(backend):
    cache = torch.zeros(3, 4, 1, 8, device=backend)
    arguments = {"key_caches": [cache], "value_caches": [cache.clone()]}
    arguments["block_mapping"] = torch.tensor([[0, 1], [1, 3]], device=backend)
    assert_rejects("copy_blocks", arguments, "block_mapping: value 3 at [1, 1]; must be in [0, 3)")
