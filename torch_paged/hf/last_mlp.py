"""The MLP of a model's last layer: it runs for the tokens whose logits are asked, where only these see its output.

A prompt needs keys and values of all its tokens, but logits of the last one. Behind the last layer's attention nothing
else is needed of the others: of 24 layers' MLPs one is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel

from torch_paged.hf.call import Call, current
from torch_paged.hf.fast_class import is_watched
from torch_paged.hf.known_models import is_known_causal_lm, is_known_layer, is_known_model
from torch_paged.hf.linear import is_fast


@contextmanager
def runs_for(tokens: Tensor, base: Any, model: PreTrainedModel, call: Call, inputs: dict[str, Any]) -> Iterator[None]:
    """Let the last MLP run for some tokens alone in the pass of this block, if nothing sees its other outputs.

    Args:
        tokens: int64, whose logits are asked: indices into the second dimension of what the model gets.
        base: the stock class of `model`.
        call: announced.
        inputs: of the model, by name.
    """
    saves_work = call.native and not call.deterministic and len(tokens) < call.input_shape[1]
    if saves_work and (mlp := _last_mlp(base, model, inputs)) is not None:
        current.asked = (mlp, tokens)
    try:
        yield
    finally:
        current.asked = None


@contextmanager
def runs_for_last_columns(
    base: Any, model: PreTrainedModel, call: Call | None, inputs: dict[str, Any]
) -> Iterator[None]:
    """The same where `logits_to_keep` says that logits of so many columns at the end are asked."""
    asked, width = inputs.get("logits_to_keep"), 0 if call is None else call.input_shape[1]
    if call is None or type(asked) is not int or not 0 < asked < width or torch.is_grad_enabled():
        yield
        return
    with runs_for(torch.arange(width - asked, width, device=model.device), base, model, call, inputs):
        yield


def asked_of(mlp: nn.Module, input: Tensor) -> Tensor | None:
    """Return the tokens, int64, for which alone `mlp` is to run over `input`, `[batch, tokens, ...]`; None: for all."""
    if current.asked is None or current.asked[0] is not mlp:
        return None
    # Once: whoever calls it later, as a hook may, has something else in mind.
    (_, tokens), current.asked = current.asked, None
    return tokens


def spread(output: Tensor, tokens: Tensor, input: Tensor) -> Tensor:
    """`output`, `[batch, len(tokens), ...]`, at its tokens' places in `input`; zeros elsewhere."""
    whole = output.new_zeros((*input.shape[:2], *output.shape[2:]))
    return whole.index_copy_(1, tokens, output)


def _last_mlp(base: Any, model: PreTrainedModel, inputs: dict[str, Any]) -> nn.Module | None:
    """Return the MLP whose output reaches nothing but the logits, each token's its own, and nobody who looks on."""
    if inputs.get("output_hidden_states") or "forward" in vars(model) or torch.compiler.is_compiling():
        return None
    decoder: Any = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not is_known_causal_lm(base) or not is_known_model(type(decoder)) or not isinstance(layers, nn.ModuleList):
        return None
    if model.config.output_hidden_states or decoder.config.output_hidden_states:
        return None
    used: list[Any] = list(layers)[: decoder.config.num_hidden_layers]
    if not used or not is_known_layer(type(used[-1])):
        return None
    mlp: nn.Module = used[-1].mlp
    if any(getattr(other, "mlp", None) is mlp for other in used[:-1]):
        return None
    seen_by = (decoder, used[-1], decoder.norm, *mlp.modules())
    if not all(map(_is_row_by_row, mlp.children())):
        return None
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or any(map(is_watched, seen_by)):
        return None
    return mlp


def _is_row_by_row(module: nn.Module) -> bool:
    """Whether a part of an MLP is known to compute each token by itself: dynamic quantisation sees the range of all."""
    if is_fast(module):
        return type(module.weight) is nn.Parameter
    return type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))
