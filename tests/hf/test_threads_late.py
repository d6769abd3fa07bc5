"""Blocks that other threads give back before anybody waits for them."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LogitsProcessorList

import torch_paged
from torch_paged.hf import line

from . import many as requests
from .models import batch, generate, tiny, tiny_t5, twin
from .test_threads_pressure import KINDS, LIMIT, OPTIONS, Meets, assert_nothing_held, at_once


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("kind", ["turns", "waves", "lookup", "beams", "recurrent", "encoder-decoder", "many"])
def test_blocks_that_came_free_before_they_were_waited_for(kind: str, how: str) -> None:
    """The other call ends between the moment when blocks run out and the one when this looks for whom to wait."""
    stock = tiny_t5() if kind == "encoder-decoder" else tiny("jamba" if kind == "recurrent" else "llama")
    model = twin(stock)
    kwargs = OPTIONS | KINDS.get({"waves": "processor"}.get(kind, kind), dict)()
    inputs = batch([12])
    with torch_paged.paged(twin(stock), block_size=4) as alone:
        generate(alone._model(), inputs, **kwargs)
        peak = alone.stats().peak_bytes
    handle = torch_paged.patch(model, block_size=4, max_memory=peak, on_pressure=how)
    reached, go, ended = threading.Event(), threading.Event(), threading.Event()
    has_others, wait = line.Line.has_others.fget, line.Line.wait
    late = threading.local()

    def let_it_end() -> None:
        if getattr(late, "waits", False):
            go.set()
            assert ended.wait(LIMIT)

    def looks(self: Any) -> Any:
        let_it_end()
        return has_others(self)

    def waits_for(self: Any, *args: Any, **how: Any) -> bool:
        let_it_end()
        return wait(self, *args, **how)

    def holds() -> None:
        meets = LogitsProcessorList([Meets(2, reached, go)])
        generate(model, batch([6]), max_new_tokens=3, eos_token_id=None, logits_processor=meets)
        ended.set()

    def asks() -> Any:
        assert reached.wait(LIMIT)
        late.waits = True
        if kind == "many":
            options = requests.OPTIONS | OPTIONS
            return requests.run(model, [inputs["input_ids"][0]], **options)[0][0].sequences
        return generate(model, inputs, **kwargs)

    with mock.patch.object(line.Line, "has_others", property(looks)), mock.patch.object(line.Line, "wait", waits_for):
        _, actual = at_once(holds, asks)
    assert go.is_set() and not isinstance(actual, Exception), actual
    assert torch.equal(actual, generate(stock, inputs, **kwargs))
    assert_nothing_held(handle)


def test_passes_of_an_encoder_decoder_show_that_a_call_is_under_way() -> None:
    """Who waits gives up on a call that nobody has seen in a pass for a while."""
    model, ends = tiny_t5(), []
    end = line.Line.pass_ends

    def ending(self: Any, *, whole: bool) -> None:
        place = self._of_thread[threading.get_ident()]
        ends.append((place.in_pass, whole))
        end(self, whole=whole)

    with torch_paged.paged(model, block_size=4), mock.patch.object(line.Line, "pass_ends", ending):
        generate(model, batch([12]), max_new_tokens=7, eos_token_id=None)
    assert ends == [(True, True)] * 7
