"""A request as transformers' own `generate` prepares it, up to where its decoding loop would begin."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from torch_paged.hf.disguise import disguise, stock_class
from torch_paged.hf.many.request import GenerationRequest


@dataclass(eq=False)
class Prepared:
    """What stock's decoding loop would be called with.

    Attributes:
        method: name of that loop.
        config: merged from the model's, the request's and its options.
        processors: built from the config, and the request's.
        criteria: likewise, without those that `max_length` and `eos` stand for.
        max_length: tokens, the prompt's included.
        eos: int64, tokens that end the sequence.
        inputs: what else the model would get.
        num_prompt_tokens: with which the loop begins: of the decoder, where an encoder has the prompt.
        alone: why this request cannot share forward passes; None if it can.
    """

    method: str
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    max_length: int
    eos: np.ndarray
    inputs: dict[str, Any]
    num_prompt_tokens: int
    alone: str | None

    @property
    def keeps(self) -> tuple[bool, bool]:
        """Whether scores and logits are asked for."""
        asked = bool(self.config.return_dict_in_generate)
        return asked and bool(self.config.output_scores), asked and bool(self.config.output_logits)


def prompt_ids(request: GenerationRequest) -> np.ndarray:
    """The prompt, int64 `[tokens]`.

    Raises:
        ValueError, TypeError: it is empty, of another shape or not of whole numbers.
    """
    try:
        prompt = torch.as_tensor(request.prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt: {type(request.prompt).__name__}; must be token ids") from error
    if prompt.numel() and prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise TypeError(f"prompt: {prompt.dtype}; must be token ids")
    if prompt.ndim == 2 and len(prompt) == 1:
        prompt = prompt[0]
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"prompt: shape {list(prompt.shape)}; must be [tokens], at least one")
    ids: np.ndarray = prompt.cpu().numpy().astype(np.int64)
    return ids


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its inputs: of one whose parameters are all offloaded, where its modules compute."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = [hook for module in model.modules() if (hook := getattr(module, "_hf_hook", None)) is not None]
    # accelerate puts several hooks of one module into one.
    single = [each for hook in hooks for each in getattr(hook, "hooks", (hook,))]
    computing = [each.execution_device for each in single if getattr(each, "execution_device", None) is not None]
    return torch.device(computing[0] if computing else "cpu")


def arguments(request: GenerationRequest, prompt: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Of `generate`, for this request alone."""
    ids = torch.from_numpy(prompt).to(device)[None]
    named = dict(
        generation_config=request.generation_config,
        prefix_allowed_tokens_fn=request.prefix_allowed_tokens_fn,
        negative_prompt_ids=request.negative_prompt_ids,
        tokenizer=request.tokenizer,
    )
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return (
        given
        | dict(request.options)
        | dict(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList(request.logits_processor),
            stopping_criteria=StoppingCriteriaList(request.stopping_criteria),
        )
    )


def prepare(
    model: PreTrainedModel, request: GenerationRequest, prompt: np.ndarray, assistant: PreTrainedModel | None
) -> Prepared:
    """What `model.generate` makes of the request.

    Raises: whatever it raises for it; ValueError, if a token is not in the vocabulary.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(f"prompt: tokens from {prompt.min()} to {prompt.max()}; must be in [0, {vocabulary})")
    twin = _twin(model)
    prepared: Prepared = twin.generate(**arguments(request, prompt, input_device(model)), assistant_model=assistant)
    return prepared


def _twin(model: PreTrainedModel) -> Any:
    """The model with the same weights and decoding loops that only tell what they were called with."""
    cls: Any = stock_class(type(model))
    twin = object.__new__(_preparing_class(cls))
    twin.__dict__ = model.__dict__
    return twin


@functools.cache
def _preparing_class(base: Any) -> type[Any]:
    class Preparing(base):  # type: ignore[misc]
        def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
            """The cache is one for all requests."""

        def _sample(self, input_ids: Tensor, **kwargs: Any) -> Prepared:
            return _prepared("_sample", input_ids, **kwargs)

        def _assisted_decoding(self, input_ids: Tensor, **kwargs: Any) -> Prepared:
            return _prepared("_assisted_decoding", input_ids, **kwargs)

        def _beam_search(self, input_ids: Tensor, **kwargs: Any) -> Prepared:
            return _prepared("_beam_search", input_ids, **kwargs)

    disguise(Preparing, base)
    return Preparing


# What every model gets, and a packed pass makes itself.
_USUAL = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values"}


def _prepared(
    method: str,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> Prepared:
    lengths = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    eos = [c.eos_token_id.flatten().cpu().numpy() for c in stopping_criteria if type(c) is EosTokenCriteria]
    others = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    for name in ("assistant_model", "tokenizer", "assistant_tokenizer", "synced_gpus", "streamer", "inputs_tensor"):
        inputs.pop(name, None)
    return Prepared(
        method=method,
        config=generation_config,
        processors=logits_processor,
        criteria=StoppingCriteriaList(others),
        max_length=min(lengths, default=np.iinfo(np.int64).max),
        eos=np.concatenate([np.empty(0, dtype=np.int64), *eos]),
        inputs=inputs,
        num_prompt_tokens=input_ids.shape[1],
        alone=_alone(method, generation_config, inputs),
    )


def _alone(method: str, config: GenerationConfig, inputs: dict[str, Any]) -> str | None:
    if method == "_beam_search" or (config.num_return_sequences or 1) > 1:
        return "beams and several returned sequences are rows of one batch"
    if config.use_cache is False or config.cache_implementation not in (None, "dynamic"):
        return "it asks for another cache, or none"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "it asks for attentions or hidden states"
    if others := sorted(name for name, value in inputs.items() if name not in _USUAL and value is not None):
        return f"the model gets {', '.join(others)}"
    return None
