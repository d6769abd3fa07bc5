"""Copies of a patched model, in this process or in one without torch_paged, are stock models."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_paged

from .host_state import host_state
from .models import batch, generate, tiny, tiny_t5, twin

Copy = Callable[[PreTrainedModel, Path], PreTrainedModel]


def _by_copy(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    other = copy.copy(model)
    # A shallow copy shares the config, and with it the name of the attention, which delegates.
    other.config = copy.deepcopy(model.config)
    return other


def _by_deepcopy(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return copy.deepcopy(model)


def _by_deepcopy_of_a_wrapper(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return copy.deepcopy(nn.Sequential(nn.Identity(), model))[1]


def _by_pickle(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def _by_torch_save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save({"model": model}, buffer)
    assert b"torch_paged" not in buffer.getvalue()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["model"]


def _by_save_pretrained(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    for file in folder.iterdir():
        assert b"torch_paged" not in file.read_bytes()
    return type(model).__base__.from_pretrained(folder).eval()


def _by_config(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def _by_its_class(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    other = type(model)(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def _by_its_classs_from_pretrained(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return model.from_pretrained(folder).eval()


COPIES: list[Copy] = [
    _by_copy, _by_deepcopy, _by_deepcopy_of_a_wrapper, _by_pickle, _by_torch_save, _by_save_pretrained, _by_config,
    _by_its_class, _by_its_classs_from_pretrained,
]  # fmt: skip


# Attention by name, by another class of the attention modules, gathered; encoder-decoders have no from_config.
CASES = [(name, copied) for name in ("llama", "bloom", "diffllama") for copied in COPIES]
CASES += [("t5", copied) for copied in (_by_deepcopy, _by_pickle, _by_save_pretrained, _by_its_class)]


@pytest.mark.parametrize(("name", "copied"), CASES, ids=lambda value: getattr(value, "__name__", value).strip("_"))
def test_copies_of_a_patched_model_are_stock(name: str, copied: Copy, tmp_path: Path) -> None:
    model, inputs = tiny_t5() if name == "t5" else tiny(name), batch([9, 5])
    classes = [type(module) for module in model.modules()]
    expected, weights = generate(model, inputs, max_new_tokens=8), twin(model).state_dict()
    with torch_paged.paged(model) as handle:
        generate(model, inputs, max_new_tokens=8)
        handle.reset_peak()
        other = copied(model, tmp_path)
        if copied is not _by_copy:
            assert [type(module) for module in other.modules()] == classes
            assert type(other.config._attn_implementation_internal) is str
        assert type(other) is classes[0]
        assert torch.equal(generate(other, inputs, max_new_tokens=8), expected)
        assert handle.stats().peak_bytes == 0
        # And it takes a patch of its own, which is no patch of the first one.
        with torch_paged.paged(other) as others:
            assert torch.equal(generate(other, inputs, max_new_tokens=8), expected)
            assert handle.stats().peak_bytes == 0 < others.stats().peak_bytes
        assert handle.patched
    assert [name for name in weights] == [name for name in other.state_dict()]
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_copy_is_as_if_the_model_had_never_been_patched(name: str) -> None:
    model = tiny(name)
    generate(model, batch([9, 5]))

    def shape_of(model: PreTrainedModel) -> dict[str, object]:
        """Without identities, which differ in every copy."""
        configs = host_state(model)["configs"].values()
        modules = {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}
        return modules | {"configs": [config[0] for config in configs] + [config[3:] for config in configs]}

    expected = shape_of(copy.deepcopy(model)), shape_of(pickle.loads(pickle.dumps(model)))
    with torch_paged.paged(model):
        generate(model, batch([9, 5]))
        assert (shape_of(copy.deepcopy(model)), shape_of(pickle.loads(pickle.dumps(model)))) == expected


def test_pickles_load_where_torch_paged_is_not_installed(tmp_path: Path) -> None:
    inputs = batch([9, 5])
    for name in ("llama", "bloom"):
        model = tiny(name)
        torch.save((inputs, generate(model, inputs)), tmp_path / f"{name}.expected")
        with torch_paged.paged(model):
            generate(model, inputs)
            torch.save(model, tmp_path / f"{name}.saved")
            (tmp_path / f"{name}.pickled").write_bytes(pickle.dumps(model))
            model.save_pretrained(tmp_path / name)
    program = """
        import pickle, sys
        sys.modules["torch_paged"] = None
        import torch
        from transformers import AutoModelForCausalLM
        for name in ("llama", "bloom"):
            inputs, expected = torch.load(f"{name}.expected")
            for model in (
                torch.load(f"{name}.saved", weights_only=False),
                pickle.load(open(f"{name}.pickled", "rb")),
                AutoModelForCausalLM.from_pretrained(name).eval(),
            ):
                tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=210)
                assert torch.equal(tokens, expected), tokens
        assert not [name for name in sys.modules if name.startswith("torch_paged.")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)


def test_a_state_dict_has_nothing_of_the_patch() -> None:
    model = tiny("llama")
    expected = {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()}
    keys = list(model.state_dict())
    with torch_paged.paged(model):
        generate(model, batch([9]))
        assert list(model.state_dict()) == keys
        model.load_state_dict(twin(model).state_dict())
        assert {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()} == expected
