"""Models spread over CPU and disk by accelerate, or offloaded layer by layer, give stock's tokens from blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_paged
from tests.emulator import library
from tests.emulator.device_memory import collect_garbage
from torch_paged import GenerationRequest
from torch_paged.hf.support import dtype_problem
from torch_paged.memory import block_memory, pool

from . import many
from .counting import count_calls
from .host_state import host_state
from .models import batch, generate, tiny, twin
from .raising import Raises

INPUTS = batch([20, 5])
DEVICE_MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def _loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder / "saved")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=DEVICE_MAP, offload_folder=folder / "offload", dtype=torch.float32
    )


def _dispatched(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder)


def _cpu_offloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def _disk_offloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


SPREAD: list[Callable[[PreTrainedModel, Path], PreTrainedModel]] = [
    _loaded, _dispatched, _cpu_offloaded, _disk_offloaded,
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("spread", SPREAD, ids=lambda spread: spread.__name__.strip("_"))
def test_weights_on_disk_and_offloaded(
    spread: Callable[[PreTrainedModel, Path], PreTrainedModel], name: str, tmp_path: Path
) -> None:
    modes: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
    model = tiny(name)
    expected = [generate(model, INPUTS, **mode) for mode in modes]
    model = spread(model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    before = host_state(model)
    with torch_paged.paged(model, block_size=4, strict=True) as handle:
        for want, mode in zip(expected, modes, strict=True):
            with count_calls() as calls:
                assert torch.equal(generate(model, INPUTS, **mode), want)
            assert calls["paged.attention"] > 0 == calls["gather"]
        assert handle.stats().blocks_used == 0
        with torch.no_grad():
            patched = model(**INPUTS).logits
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, patched)
    assert host_state(model) == before


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize("spread", SPREAD, ids=lambda spread: spread.__name__.strip("_"))
def test_requests_over_a_spread_model(
    spread: Callable[[PreTrainedModel, Path], PreTrainedModel], name: str, tmp_path: Path
) -> None:
    """More than fit, in shared passes, each token of a prompt once unless its blocks were given up."""
    stock = tiny(name)
    model, asked = spread(twin(stock), tmp_path), many.prompts([9, 21, 5, 30, 17])
    requests = [*asked, GenerationRequest(asked[0], logits_processor=[Raises(4)])]
    options = many.OPTIONS | {"eos_token_id": None}
    knobs: dict[str, Any] = dict(block_size=many.BLOCK, max_memory=14 * many.BLOCK_BYTES)
    with torch_paged.paged(model, **knobs) as handle, many.admitting_all(), count_calls() as calls:
        answers, stats = many.run(model, requests, max_num_seqs=4, max_num_batched_tokens=16, **options)
        assert handle.stats().blocks_used == 0
    assert calls["gather"] == stats.alone == 0 < stats.swaps <= stats.preemptions
    assert isinstance(answers[5].error, ZeroDivisionError) and stats.finished == 5
    assert stats.tokens_prefilled == sum(map(len, requests[:5])) + len(asked[0])
    for number, prompt in enumerate(asked):
        many.assert_answer(stock, prompt, answers[number], **options)


def test_spreading_a_model_that_is_patched(tmp_path: Path) -> None:
    model = tiny("llama")
    expected = generate(model, INPUTS)
    handle = torch_paged.patch(model)
    model = _dispatched(model, tmp_path)
    assert torch.equal(generate(model, INPUTS), expected) and handle.stats().peak_bytes > 0
    handle.unpatch()
    assert torch.equal(generate(model, INPUTS), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3"])
def test_a_forward_pass_mixes_nothing_of_the_cpu_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, in the place of a GPU, an op refuses a tensor that was left on the CPU."""
    monkeypatch.setattr("torch_paged.hf.layer.has_kernel", lambda op, device_type: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # which does not know it
    model = tiny(name).to("meta")
    cache = torch_paged.PagedCache(model.config, max_memory="4MiB", block_size=4)
    with torch_paged.paged(model), torch.no_grad(), count_calls() as calls:
        logits = model(torch.ones(2, 9, dtype=torch.long, device="meta"), past_key_values=cache).logits
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
    assert logits.is_meta and cache.get_seq_length() == 10
    layers = model.config.num_hidden_layers
    assert calls["paged.attention"] == calls["write"] == 2 * layers
    assert calls["gather"] == calls["paged.gather_cache"] == 0


@pytest.mark.skipif(not library.has_nvcc(), reason=library.NO_NVCC)
def test_generate_on_the_emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, pages that come and go: blocks that a call does not hold have no memory that anything could touch."""
    model = tiny("llama")
    modes: list[dict[str, Any]] = [{}, {"num_beams": 2}]
    expected = [generate(model, INPUTS, max_new_tokens=3, **mode) for mode in modes]
    like = torch.empty(0, dtype=torch.uint8)
    with library.emulated("attention") as ops, ops.device_memory.device(4096) as device:
        monkeypatch.setattr(pool, "block_memory", lambda layout, _: block_memory.device_memory(layout, like))
        before = ops.num_launches
        with torch_paged.paged(model, block_size=4, strict=True, max_memory="1MiB") as handle:
            for want, mode in zip(expected, modes, strict=True):
                assert torch.equal(generate(model, INPUTS, max_new_tokens=3, **mode), want)
                # `generate` has given all back but the first page.
                assert device.held.mapped == 4096
            assert handle.stats().peak_bytes > 4096
        assert ops.num_launches > before
        del handle
        collect_garbage()


def test_float64_on_a_gpu_is_left_to_the_models_own_attention():
    assert dtype_problem(torch.float64, "cuda") == "attention in float64 is not among the kernels for cuda"
    assert dtype_problem(torch.float64, "cpu") is None
    assert all(dtype_problem(dtype, "cuda") is None for dtype in (torch.float32, torch.bfloat16, torch.float16))
