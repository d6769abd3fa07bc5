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

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call, current
from torch_paged.hf.fast_class import runs_otherwise
from torch_paged.hf.known_models import is_known_causal_lm, is_known_layer, is_known_model
from torch_paged.hf.linear import is_fast as is_fast_linear
from torch_paged.hf.rms_norm import is_fast as is_fast_norm
from torch_paged.hf.row_hooks import has_row_hooks


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
    saves_work = saves_work and base.__call__ is nn.Module.__call__ and not torch.compiler.is_compiling()
    if saves_work and (mlp := _last_mlp(base, model, inputs)) is not None:
        current.asked = (mlp, tokens)
    try:
        yield
    finally:
        current.asked = None


@contextmanager
def runs_for_last_columns(
    base: Any, model: PreTrainedModel, cache: PagedCache, call: Call | None, inputs: dict[str, Any]
) -> Iterator[None]:
    """The same in a call that is not packed, where `logits_to_keep` asks for logits of so many columns at the end."""
    asked, width = inputs.get("logits_to_keep"), 0 if call is None else call.input_shape[1]
    if (
        call is None
        or type(asked) is not int
        or not 0 < asked < width
        or torch.is_grad_enabled()
        or not cache.config.pack_rows
        # Packed calls have none.
        or has_row_hooks(model)
    ):
        yield
        return
    with runs_for(torch.arange(width - asked, width), base, model, call, inputs):
        yield


def asked_of(mlp: nn.Module, input: Tensor) -> Tensor | None:
    """Return the tokens, int64, for which alone `mlp` is to run over `input`, `[batch, tokens, ...]`; None: for all."""
    if current.asked is None or current.asked[0] is not mlp:
        return None
    # Once: whoever calls it later has something else in mind.
    (_, tokens), current.asked = current.asked, None
    return tokens.to(input.device)


def spread(output: Tensor, tokens: Tensor, input: Tensor) -> Tensor:
    """`output`, `[batch, len(tokens), ...]`, at its tokens' places in `input`; zeros elsewhere."""
    whole = output.new_zeros((*input.shape[:2], *output.shape[2:]))
    whole[:, tokens] = output
    return whole


def _last_mlp(base: Any, model: PreTrainedModel, inputs: dict[str, Any]) -> nn.Module | None:
    """Return the MLP whose output reaches nothing but the logits, each token's its own, and nobody who looks on."""
    decoder: Any = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not is_known_causal_lm(base) or not is_known_model(type(decoder)) or not isinstance(layers, nn.ModuleList):
        return None
    used: list[Any] = list(layers)[: decoder.config.num_hidden_layers]
    if not used or not is_known_layer(type(used[-1])):
        return None
    mlp: nn.Module = used[-1].mlp
    if any(getattr(other, "mlp", None) is mlp for other in used[:-1]):
        return None
    if not all(map(_is_row_by_row, mlp.children())) or not is_fast_norm(decoder.norm):
        return None
    if any(_asks_for_more(each) for each in (inputs, vars(model.config), vars(decoder.config))):
        return None
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return None
    seen_by = (model, decoder, used[-1], decoder.norm, *mlp.modules())
    return None if any(module.training or _is_looked_into(module) for module in seen_by) else mlp


def _is_row_by_row(module: nn.Module) -> bool:
    """Whether a part of an MLP is known to compute each token by itself: dynamic quantisation sees the range of all."""
    if is_fast_linear(module):
        return type(module.weight) is nn.Parameter
    return type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))


def _asks_for_more(named: dict[str, Any]) -> bool:
    """Whether arguments or a config ask for outputs besides the logits."""
    return any(value for name, value in named.items() if name.startswith("output_"))


def _is_looked_into(module: nn.Module) -> bool:
    """`is_watched`, but by the hooks that transformers has left there since it was asked for hidden states once."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    others = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    return runs_otherwise(module) or bool(others)
