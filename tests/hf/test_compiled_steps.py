"""Compiled passes over blocks: stock's tokens, full graphs, and as few of them as there are kinds of passes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters, counters
from transformers import CompileConfig, LogitsProcessorList, PreTrainedModel

import torch_paged
from torch_paged.hf import compiled
from torch_paged.hf.group import Step
from torch_paged.hf.step_cache import StepLayer

from .counting import count_calls, messages
from .graphs import Graphs, fresh_dynamo
from .models import assert_same_tokens, batch, generate, tiny, twin

RAGGED, ALONE = batch([20, 5, 9]), batch([17])
NAMES = [
    "llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi", "mixtral",
    # K and V out of one chunk; attention code of its own.
    "gpt_neox", "bloom",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    with fresh_dynamo():
        yield


@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(name)
    stock = twin(model)
    graphs = Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs}, block_size=4)
    for number, options in enumerate([{}, {"num_beams": 3, "max_new_tokens": 12}]):
        actual = generate(model, RAGGED, **options)
        assert_same_tokens(stock, generate(stock, RAGGED, **options), actual, prompt=RAGGED)
        # The first prefill runs uncompiled and shows what the model's masks are.
        assert graphs.compiled == 1 + number
    # Nothing broke a graph: that would have been said, and run uncompiled.
    assert messages(caplog) == []
    layers = model.config.num_hidden_layers
    assert sorted(graphs.ops) == ["attention"] * layers + ["reshape_and_cache"] * layers
    gc.collect()  # caplog keeps what Dynamo traces
    assert handle.stats().blocks_used == 0


def test_blocks_come_back_without_the_cycle_collector() -> None:
    model = tiny("llama")
    handle = torch_paged.patch(model, compile={"backend": Graphs()}, block_size=4)
    gc.collect()
    gc.disable()
    try:
        generate(model, RAGGED)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"compile": False}])
def test_blocks_come_back_where_frames_are_kept(options: dict[str, Any]) -> None:
    """As Dynamo keeps those of errors that it caught, in cycles: each refers to its callers, and these to the cache."""
    frames: list[Any] = []

    def keeping(graph: Any, inputs: Any) -> Any:
        frames.append(sys._getframe())
        return graph.forward

    def looking(ids: Tensor, scores: Tensor) -> Tensor:
        frames.append(sys._getframe())
        return scores

    model = tiny("llama")
    stock = twin(model)
    compiles = options.pop("compile", True)
    handle = torch_paged.patch(model, compile={"backend": keeping} if compiles else False, block_size=4)
    if not compiles:
        options["logits_processor"] = LogitsProcessorList([looking])
    actual = generate(model, RAGGED, **options)
    assert frames and handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    assert_same_tokens(stock, generate(stock, RAGGED, **options), actual, prompt=RAGGED)
    # Who gets the cache, or may keep it, keeps its blocks.
    result = generate(model, RAGGED, return_dict_in_generate=True, **options)
    held = handle.stats().blocks_used
    assert held > 0 and result.past_key_values.get_seq_length() > 20
    caches: list[Any] = []
    hook = model.model.register_forward_hook(lambda module, args, outputs: caches.append(outputs.past_key_values))
    generate(model, RAGGED, **options)
    hook.remove()
    assert caches[-1].get_seq_length() > 20 and handle.stats().blocks_used > held


def test_every_decode_step_runs_compiled() -> None:
    model = tiny("llama")
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    generate(model, RAGGED, eos_token_id=None, max_new_tokens=11)
    # The prefill gave the first token.
    assert graphs.runs == 10
    generate(model, RAGGED, eos_token_id=None, max_new_tokens=11)
    assert graphs.runs == 10 + 11
    # Modes that see every op see them in uncompiled steps.
    with count_calls() as calls:
        generate(model, RAGGED, eos_token_id=None, max_new_tokens=11)
    assert calls["paged.attention"] == 11 * 3


def test_number_of_graphs() -> None:
    model = tiny("llama")
    graphs = Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs}, block_size=4, max_prefill_tokens=16)
    # A piece of the first prompt is uncompiled, the next one is not.
    generate(model, RAGGED, eos_token_id=None)
    assert graphs.compiled == 2
    # Nothing for longer sequences, a second generate with a new cache, other numbers of rows, other pieces.
    generate(model, RAGGED, eos_token_id=None, max_new_tokens=70)
    generate(model, batch([30, 31, 7, 9, 12, 2, 40]), eos_token_id=None)
    cache = torch_paged.PagedCache(model.config, block_size=4, max_memory="1MiB")
    generate(model, RAGGED, eos_token_id=None, past_key_values=cache)
    assert graphs.compiled == 2
    del cache
    # A step of a row by itself.
    generate(model, ALONE, eos_token_id=None)
    generate(model, batch([40]), eos_token_id=None, max_new_tokens=50)
    assert graphs.compiled == 3
    assert handle.stats().blocks_used == 0


def test_prefills_tell_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels plan by it: the number of all tokens would be a bound too, of many times as much work."""
    model = tiny("llama")
    lengths: list[int] = []
    graphs = []

    class Looking(torch.fx.Interpreter):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if target is torch.ops.paged.attention.default:
                lengths.append(args[6])
            return super().call_function(target, args, kwargs)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return Looking(graph).run

    torch_paged.patch(model, compile={"backend": backend}, block_size=4, share_prompts=False)
    generate(model, RAGGED, eos_token_id=None, max_new_tokens=2)
    assert lengths == [1] * 3
    for prompts, longest in ((RAGGED, 20), (batch([3, 31, 7, 31]), 31), (ALONE, 17), (batch([2, 2]), 2)):
        lengths.clear()
        generate(model, prompts, eos_token_id=None, max_new_tokens=1)
        assert lengths == [longest] * 3
    assert len(graphs) == 2


def test_rows_that_leave_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    stock = twin(model)
    prompts = batch([20, 5, 9, 14])
    # Rows end one after the other, each with a token that no other row has.
    free = generate(stock, prompts, eos_token_id=None)[:, 20:].tolist()
    last: list[int] = []
    for row in free:
        others = {token for other in free if other is not row for token in other}
        last.append(next(i for i, token in enumerate(row) if i and i not in last and token not in {*others, *row[:i]}))
    ends = [row[i] for row, i in zip(free, last, strict=True)]
    expected = generate(stock, prompts, eos_token_id=ends)
    rows: list[int] = []
    prepared = compiled._prepared

    def counting(step: Step, is_decode: bool) -> Step:
        rows.append(len(step.seq_lens))
        return prepared(step, is_decode)

    monkeypatch.setattr(compiled, "_prepared", counting)
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    assert_same_tokens(stock, expected, generate(model, prompts, eos_token_id=ends), prompt=prompts)
    steps = [sum(end >= step for end in last) for step in range(1, max(last) + 1)]
    assert rows == steps and set(steps) == {4, 3, 2, 1}
    # For a row by itself, and for all other numbers.
    assert graphs.compiled == 2 and graphs.runs == len(steps)


def test_caches_stay_where_they_are() -> None:
    """CUDA graphs copy inputs that are not marked so, and take no graph that writes them."""
    model = tiny("llama")
    static: list[tuple[int, ...]] = []

    def looking(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.dim() == 4:
                assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
                static.append(tuple(value.shape[1:]))
        return graph.forward

    torch_paged.patch(model, compile={"backend": looking}, block_size=4)
    generate(model, RAGGED, max_new_tokens=3)
    assert static == [(4, 2, 16)] * 2 * 3


def test_steps_on_a_gpu_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph is captured for each combination of rows and table width; here on a CPU, where none is."""
    model = tiny("llama")
    stock = twin(model)
    sizes: list[tuple[int, ...]] = []
    prepared = compiled._prepared

    def counting(step: Step, is_decode: bool) -> Step:
        if is_decode:
            sizes.append(tuple(step.block_table.shape))
            assert len(step.seq_lens) == len(step.slot_mapping) == len(step.cu_seqlens_q) - 1 == sizes[-1][0]
        return prepared(step, is_decode)

    monkeypatch.setattr(compiled, "_prepared", counting)
    monkeypatch.setattr(compiled, "fills_up", lambda device: True)
    graphs = Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs}, block_size=4, share_prompts=False)
    for number, filled in ((1, 1), (3, 4), (5, 8), (9, 16)):
        sizes.clear()
        prompts = batch([20, 5, 9, 3, 17, 6, 7, 8, 12][:number])
        expected = generate(stock, prompts, eos_token_id=None)
        assert_same_tokens(stock, expected, generate(model, prompts, eos_token_id=None), prompt=prompts)
        # From 21 to 43 tokens in blocks of 4.
        assert len(sizes) == 23 and set(sizes) == {(filled, 8), (filled, 16)}
    # A step of one row, of several, a prefill.
    assert graphs.compiled == 3 and handle.stats().blocks_used == 0


def test_no_cache_is_copied() -> None:
    model = tiny("llama")
    stock = twin(model)
    torch_paged.patch(model, compile={"backend": "inductor"})
    ReinplaceCounters.clear()
    counters.clear()
    actual = generate(model, RAGGED)
    assert ReinplaceCounters.get_total_missed_bytes() == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_tokens(stock, generate(stock, RAGGED), actual, prompt=RAGGED)
    # A prefill, and no other step: half of the machine's memory in one pool, and little in another.
    cache = torch_paged.PagedCache(model.config, max_memory="1MiB")
    assert_same_tokens(stock, generate(stock, RAGGED), generate(model, RAGGED, past_key_values=cache), prompt=RAGGED)
    assert counters["stats"]["unique_graphs"] == 2
    assert ReinplaceCounters.get_total_missed_bytes() == 0


def _by_forward(model: PreTrainedModel, backend: Any) -> dict[str, Any]:
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return {}


def _by_compile(model: PreTrainedModel, backend: Any) -> dict[str, Any]:
    model.compile(backend=backend, fullgraph=True)
    return {}


def _by_config(model: PreTrainedModel, backend: Any) -> dict[str, Any]:
    # A copy of an object would count for itself.
    config = CompileConfig(fullgraph=True, backend=lambda *args: backend(*args), mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize("how", [_by_forward, _by_compile, _by_config])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_ways_to_compile(name: str, how: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(name)
    stock = twin(model)
    torch_paged.patch(model, strict=True, block_size=4)
    graphs = Graphs()
    options = how(model, graphs)
    for inputs in (RAGGED, batch([30, 4, 11, 6])):
        actual = generate(model, inputs, **options)
        assert_same_tokens(stock, generate(stock, inputs), actual, prompt=inputs)
    # Decode steps, and what else the user compiles: prefills after the one that shows what the model's masks are.
    assert graphs.compiled == (1 if how is _by_config else 2)
    assert messages(caplog) == []
    torch_paged.unpatch(model)
    assert type(model) is type(stock)


@pytest.mark.parametrize(("name", "mode"), [
    ("mixtral", torch.no_grad),
    ("gemma3", torch.inference_mode),
    ("gpt2", lambda: torch.autocast("cpu", torch.bfloat16)),
])  # fmt: skip
def test_modes(name: str, mode: Any) -> None:
    model = tiny(name)
    torch_paged.patch(model)
    context: AbstractContextManager[None] = mode()
    with context:
        expected = generate(model, RAGGED)
    torch_paged.unpatch(model)
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    with mode():
        assert torch.equal(generate(model, RAGGED), expected)
        assert torch.equal(generate(model, RAGGED), expected)
    # The steps, and the second prefill.
    assert graphs.compiled == 2 and graphs.runs == 2 * 23 + 1


def test_code_that_computes_with_new_keys_gathers(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    stock = twin(model)
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    update = StepLayer.update

    def touched(self: StepLayer, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        key, value = update(self, key, value)
        return key * 1, value

    with mock.patch.object(StepLayer, "update", touched):
        actual = generate(model, RAGGED)
    assert_same_tokens(stock, generate(stock, RAGGED), actual, prompt=RAGGED)
    assert graphs.runs == 0
    (said,) = messages(caplog)
    assert "LlamaForCausalLM" in said and "cannot be compiled" in said and said.endswith("runs uncompiled")


def test_a_model_that_does_not_trace_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    stock = twin(model)

    def untraceable(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such backend")

    torch_paged.patch(model, compile={"backend": untraceable})
    for _ in range(2):
        assert_same_tokens(stock, generate(stock, RAGGED), generate(model, RAGGED), prompt=RAGGED)
    (said,) = messages(caplog)
    assert "no such backend" in said


def test_an_exception_in_a_compiled_step() -> None:
    model = tiny("llama")
    stock = twin(model)
    graphs = Graphs()
    handle = torch_paged.patch(model, compile={"backend": graphs})

    def raising(graph: Any, inputs: Any) -> Any:
        run = graphs(graph, inputs)

        def stumble(*args: Any) -> Any:
            if graphs.runs == 5:
                graphs.runs += 1
                raise ArithmeticError("in a kernel")
            return run(*args)

        return stumble

    handle = torch_paged.patch(model, compile={"backend": raising})
    with pytest.raises(ArithmeticError):
        generate(model, RAGGED)
    assert handle.stats().blocks_used == 0
    assert_same_tokens(stock, generate(stock, RAGGED), generate(model, RAGGED), prompt=RAGGED)
    torch_paged.unpatch(model)
    assert type(model) is type(stock)
    assert torch.equal(generate(stock, RAGGED), generate(model, RAGGED))


def test_generate_many() -> None:
    model = tiny("llama")
    prompts = [torch.arange(3, 3 + length).tolist() for length in (20, 5, 9, 30)]
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch_paged.patch(model)
    expected = [result.sequences[0].tolist() for result in torch_paged.generate_many(model, prompts, **options)]
    torch_paged.unpatch(model)
    graphs = Graphs()
    torch_paged.patch(model, compile={"backend": graphs})
    actual = [result.sequences[0].tolist() for result in torch_paged.generate_many(model, prompts, **options)]
    assert sorted(actual) == sorted(expected)
    assert graphs.compiled == 1 and graphs.runs == 9


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [("yes", TypeError, "compile: str; must be a bool or a dict"), ({"back": 1}, ValueError, "compile: back; must be")],
)
def test_rejects(compile: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_paged.patch(tiny("llama"), compile=compile)
