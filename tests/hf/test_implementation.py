"""The name of the attention implementation while a model is patched: ours to look up, the model's own to compare."""

from __future__ import annotations

import pytest

import torch_paged

from .models import batch, tiny


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
