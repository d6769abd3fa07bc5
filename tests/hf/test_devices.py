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
from torch_paged.hf.support import dtype_problem

from .counting import count_calls
from .host_state import host_state
from .models import batch, generate, tiny

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


def test_spreading_a_model_that_is_patched(tmp_path: Path) -> None:
    model = tiny("llama")
    expected = generate(model, INPUTS)
    handle = torch_paged.patch(model)
    model = _dispatched(model, tmp_path)
    assert torch.equal(generate(model, INPUTS), expected) and handle.stats().peak_bytes > 0
    handle.unpatch()
    assert torch.equal(generate(model, INPUTS), expected)


def test_float64_on_a_gpu_is_left_to_the_models_own_attention():
    assert dtype_problem(torch.float64, "cuda") == "attention in float64 is not among the kernels for cuda"
    assert dtype_problem(torch.float64, "cpu") is None
    assert all(dtype_problem(dtype, "cuda") is None for dtype in (torch.float32, torch.bfloat16, torch.float16))
