"""A native call that is taken back and run again gathered leaves no trace of the first attempt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.masking_utils import create_masks_for_generate

import torch_paged

from .causal_types import tiny_causal
from .counting import count_calls, count_tokens
from .models import batch, generate, sharpen, tiny


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_draws_what_stock_draws(name: str) -> None:
    """The layer that asks for its own attention comes after others have drawn."""
    model, inputs = tiny(name).train(), batch([12, 5])
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if name == "llama":
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: torch.dropout(out, 0.3, True))
    for module in dropouts:
        module.p = 0.2
    model.config.attn_pdrop = model.config.attention_dropout = 0.0
    layers = model.model.layers if name == "llama" else model.transformer.h
    (layers[2].self_attn if name == "llama" else layers[2].attn).is_causal = False
    kwargs: dict[str, Any] = dict(do_sample=True, max_new_tokens=6, eos_token_id=None)
    expected = generate(model, inputs, **kwargs)
    after = torch.get_rng_state()
    with torch_paged.paged(model), count_tokens(model) as tokens:
        assert torch.equal(generate(model, inputs, **kwargs), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert tokens[:2] == [24, 24], "nothing was run again"


@pytest.mark.parametrize("name", ["bert", "biogpt", "roberta", "gpt_neo", "opt", "xmod"])
def test_attention_dropout_by_any_name_is_known_before_the_call(name: str) -> None:
    model, inputs = tiny_causal(name).train(), batch([12, 5])
    expected = generate(model, inputs, max_new_tokens=6, eos_token_id=None)
    after = torch.get_rng_state()
    with torch_paged.paged(model), count_tokens(model) as tokens:
        assert torch.equal(generate(model, inputs, max_new_tokens=6, eos_token_id=None), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert len(tokens) == 6


def test_a_cache_that_was_reset_reads_blocks_again() -> None:
    model, long, short = tiny_causal("falcon", alibi=True, multi_query=False, num_kv_heads=4), batch([260]), batch([9])
    cache = torch_paged.PagedCache(model.config)
    with torch_paged.paged(model), torch.no_grad(), count_calls() as calls:
        model(**long, past_key_values=cache)
        assert calls["gather"] > 0
        cache.reset()
        calls.clear()
        model(**short, past_key_values=cache)
    assert calls["gather"] == 0 < calls["paged.attention"]


def test_a_dict_of_masks() -> None:
    model, inputs = tiny_causal("gemma3_text"), batch([9, 5])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    masks = create_masks_for_generate(
        config=model.config, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], past_key_values=None
    )
    call = dict(input_ids=inputs["input_ids"], attention_mask=masks)
    with torch.no_grad():
        expected = model(**call, past_key_values=DynamicCache(config=model.config)).logits
        with torch_paged.paged(model):
            actual = model(**call, past_key_values=torch_paged.PagedCache(model.config)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, copies", [(1, 4), (2, 2), (1, 3)])
@pytest.mark.parametrize("mode", ["num_beams", "num_return_sequences"])
def test_positions_of_several_kinds(rows: int, copies: int, mode: str) -> None:
    """Multimodal rotary positions have the kinds in front: four of them look like four rows."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        bos_token_id=1, eos_token_id=210, pad_token_id=0,
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=1, patch_size=4)
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=205, video_token_id=206, vision_start_token_id=207,
        vision_end_token_id=208,
    )  # fmt: skip
    model, inputs = sharpen(Qwen2VLForConditionalGeneration(config).eval()), batch([9] * rows)
    inputs["input_ids"].clamp_(max=200)
    kwargs = {mode: copies, "do_sample": mode == "num_return_sequences", "max_new_tokens": 6}
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs, **kwargs), expected)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
