"""The name of the attention implementation while a model is patched: ours to look up, the model's own to compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GPTJConfig, GPTNeoConfig

import torch_paged

from .models import batch, tiny

TABLES: list[Any] = [
    FalconConfig(vocab_size=211, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    GPTNeoConfig(vocab_size=211, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    GPTJConfig(vocab_size=211, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_config_still_answers_to_the_implementation_it_named(implementation: str) -> None:
    """Models, the Trainer and user code branch on the name; the config itself refuses output_attentions by it."""
    model, inputs = tiny("llama", attn_implementation=implementation), batch([9, 5])
    with torch_paged.paged(model):
        name = model.config._attn_implementation
        assert (name == implementation, name != implementation) == (True, False)
        assert (name == "flash_attention_2", name != "flash_attention_2") == (False, True)
        assert name == "torch_paged" and {implementation: 1, "torch_paged": 2}[name] == 2
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation is name
        if implementation == "eager":
            model.config.output_attentions = True
            assert len(model(**inputs).attentions) == 3
        else:
            with pytest.raises(ValueError, match="output_attentions"):
                model.config.output_attentions = True


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.model_type)
def test_a_model_can_be_built_from_the_config_of_a_patched_one(config: Any) -> None:
    """These look their attention class up by the implementation's name."""
    model, inputs = AutoModelForCausalLM.from_config(config).eval(), batch([9, 5])
    with torch_paged.paged(model):
        other = type(model.base_model)(model.config).eval()
        other.load_state_dict(model.base_model.state_dict())
        actual = other(**inputs).last_hidden_state
    assert torch.equal(actual, model.base_model(**inputs).last_hidden_state)


@torch.no_grad()
def test_an_export_reads_through_the_name() -> None:
    """The interface compares and looks up the name of the implementation inside the graph."""
    model, inputs = tiny("llama"), batch([9, 9])
    expected = model(**inputs, use_cache=False).logits
    with torch_paged.paged(model):
        exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=True).module()
    torch.testing.assert_close(exported(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_patched_model_compiles_without_a_cache_in_one_graph(name: str) -> None:
    """Full and sliding masks: nothing of ours that Dynamo cannot trace stands in the way."""
    model, inputs = tiny(name), batch([20, 20])
    expected = model(**inputs, use_cache=False).logits
    torch_paged.patch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs, use_cache=False).logits, expected)
