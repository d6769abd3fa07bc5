"""What some rows get of the inputs of a batch."""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutput

from torch_paged.hf.row_inputs import inputs_of, unknown_inputs


def test_each_kind() -> None:
    mask, positions = torch.arange(12).view(3, 4), torch.arange(36).view(3, 3, 4)
    encoded = BaseModelOutput(last_hidden_state=torch.arange(24.0).view(3, 4, 2), hidden_states=(torch.ones(3, 4, 2),))
    one_for_all = torch.ones(1, 4, dtype=torch.long)
    inputs = {"attention_mask": mask, "position_ids": positions, "encoder_outputs": encoded, "use_cache": True}
    given = inputs_of(inputs, range(1, 3), 3)
    assert torch.equal(given["attention_mask"], mask[1:])
    # Of three kinds and three rows.
    assert torch.equal(given["position_ids"], positions[:, 1:])
    assert torch.equal(given["encoder_outputs"].last_hidden_state, encoded.last_hidden_state[1:])
    assert type(given["encoder_outputs"]) is BaseModelOutput
    assert [each.shape for each in given["encoder_outputs"].hidden_states] == [torch.Size([2, 4, 2])]
    assert given["use_cache"] is True
    assert inputs_of({"position_ids": one_for_all}, range(1, 3), 3)["position_ids"] is one_for_all


def test_what_may_belong_to_several_rows() -> None:
    inputs = {"pixel_values": torch.ones(3, 2), "image_sizes": [(1, 2)], "logits_to_keep": 1, "labels": None}
    assert unknown_inputs(inputs | {"past_key_values": object(), "attention_mask": torch.ones(3, 2)}) == [
        "image_sizes", "pixel_values",
    ]  # fmt: skip
