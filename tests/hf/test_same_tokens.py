"""What the generate tests mean by the same tokens: a near-tie of stock's may fall either way, nothing else may."""

from __future__ import annotations

import pytest
import torch

import torch_paged

from .models import assert_same_tokens, batch, generate, tiny

RARE = torch.tensor(100)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_near_ties_are_judged_under_the_prompts_mask(name: str, patched: bool) -> None:
    model, inputs = tiny(name, torch.float64), batch([9, 4])
    unmasked = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    expected = generate(model, inputs, max_new_tokens=3)
    options = dict(max_new_tokens=1, return_dict_in_generate=True, output_hidden_states=True)
    masked_state, state = (generate(model, each, **options).hidden_states[0][-1][1, -1] for each in (inputs, unmasked))
    head, token = model.get_output_embeddings(), expected[1, 9]
    # As good as the best token where the pads are masked, another logit where they are seen.
    apart = state - (state @ masked_state) / (masked_state @ masked_state) * masked_state
    head.weight = torch.nn.Parameter(head.weight.detach().clone().index_put_((RARE,), head.weight[token] + apart))
    other = expected.clone()
    other[1, 9] = RARE
    if patched:
        torch_paged.patch(model)
    assert_same_tokens(model, expected, other, prompt=inputs)
    with pytest.raises(AssertionError, match="row 1, column 9"):
        assert_same_tokens(model, expected, other, prompt=unmasked)


def test_what_is_no_near_tie_fails() -> None:
    model, inputs = tiny("llama"), batch([9, 4])
    expected = generate(model, inputs, num_return_sequences=2, num_beams=2)
    assert_same_tokens(model, expected, expected.clone(), prompt=inputs)
    for column, message in ((8, "the prompt itself"), (12, "row 3, column 12")):
        other = expected.clone()
        other[3, column] = RARE
        with pytest.raises(AssertionError, match=message):
            assert_same_tokens(model, expected, other, prompt=inputs)
    with pytest.raises(AssertionError):
        assert_same_tokens(model, expected, expected[:, :-1], prompt=inputs)
