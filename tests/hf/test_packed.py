"""One packed pass over prefills, chunks and decode steps of different rows computes what stock computes row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.hf.packed import packed_call

from .counting import count_calls, count_tokens
from .models import VOCAB, batch, tiny

NATIVE_PACKED = ["llama", "qwen2-sliding", "qwen3", "mistral", "gpt2", "opt", "bloom", "gemma2", "gpt_oss"]


@pytest.mark.parametrize("name", NATIVE_PACKED)
@torch.no_grad()
def test_prefill_chunks_and_decode_steps_in_one_pass(name: str) -> None:
    model = tiny(name)
    sequences = [batch([n], seed=n)["input_ids"][0] for n in (31, 6, 18)]
    stock = [model(sequence[None]).logits[0] for sequence in sequences]
    # Tokens of each row in each pass: prefill, a chunk, decode steps, a row that is not in the pass.
    passes = [np.array(counts) for counts in ([16, 0, 17], [14, 5, 0], [1, 1, 1])]
    done = np.zeros(3, dtype=np.int64)
    with torch_paged.paged(model, block_size=4), count_tokens(model) as tokens, count_calls() as calls:
        cache = torch_paged.PagedCache(model.config, block_size=4)
        for counts in passes:
            rows = [s[start : start + n] for s, start, n in zip(sequences, done, counts, strict=True)]
            everything = torch.arange(int(counts.sum()))
            logits = packed_call(model, cache, counts, torch.cat(rows), logits_to_keep=everything).logits
            for row, part in enumerate(logits[0].split(counts.tolist())):
                expected = stock[row][done[row] : done[row] + counts[row]]
                torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
            done += counts
        assert cache.state.seq_lens.tolist() == done.tolist() == [31, 6, 18]
    assert tokens == [33, 19, 3]
    assert calls["gather"] == 0


@torch.no_grad()
def test_the_last_tokens_logits_are_kept_by_default() -> None:
    model, ids = tiny("llama"), batch([9, 4])["input_ids"]
    row: Tensor = ids[1, 5:]
    with torch_paged.paged(model):
        cache = torch_paged.PagedCache(model.config)
        logits = packed_call(model, cache, np.array([9, 0, 4]), torch.cat([ids[0], row])).logits
    assert logits.shape == (1, 2, VOCAB)
    torch.testing.assert_close(logits[0, 1], model(row[None]).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pass_that_does_not_fit_changes_nothing() -> None:
    model, ids = tiny("llama"), batch([40])["input_ids"][0]
    with torch_paged.paged(model):
        cache = torch_paged.PagedCache(model.config, block_size=4, max_memory=4 * 4 * 3 * 2 * 2 * 16 * 4)
        packed_call(model, cache, np.array([10, 0]), ids[:10])
        with pytest.raises(torch_paged.PoolExhausted):
            packed_call(model, cache, np.array([1, 20]), ids[:21])
        assert cache.state.seq_lens.tolist() == [10, 0]
        assert cache.stats().blocks_used == 3
        packed_call(model, cache, np.array([1, 4]), ids[:5])
        assert cache.state.seq_lens.tolist() == [11, 4]
