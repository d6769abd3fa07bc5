"""What goes into generate_many and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from torch import Tensor
from transformers import GenerationConfig

FinishReason = Literal["eos", "length", "stop", "cancelled", "timeout", "error"]


@dataclass(eq=False)
class GenerationRequest:
    """One prompt, and what `model.generate` would be given with it.

    Attributes:
        prompt: token ids, int64 `[tokens]` or `[1, tokens]`, or a sequence of ints.
        generation_config: as of `generate`: merged with the model's and with `options`.
        options: keyword arguments of `generate` that set fields of the config, such as `{"max_new_tokens": 64}`.
        seed: what it samples with: the tokens are those of `generate` alone after `torch.manual_seed(seed)`. None draws
            a seed from torch's global generator.
        logits_processor, stopping_criteria, prefix_allowed_tokens_fn, negative_prompt_ids, tokenizer: as of `generate`;
            processors and criteria see this request alone, `[1, tokens]`.
        streamer: as of `generate`: gets the prompt, then tokens as they come.
        timeout: seconds after which it ends with what it has, from when it was taken from the requests; None = the
            `timeout` of `generate_many`.
        salt: as of `PagedConfig`, whose salt None means: prefixes are shared with requests of the same salt alone.
        request_id: names the request in results and for `cancel`; None = its number, from 0.
    """

    prompt: Tensor | Sequence[int]
    generation_config: GenerationConfig | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logits_processor: Sequence[Any] = ()
    stopping_criteria: Sequence[Any] = ()
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    negative_prompt_ids: Tensor | None = None
    tokenizer: Any = None
    streamer: Any = None
    timeout: float | None = None
    salt: str | None = None
    request_id: Hashable = None


def check_fields(request: GenerationRequest) -> None:
    """Raises: TypeError, ValueError, for what `generate` does not look at itself."""
    if not isinstance(request.options, Mapping):
        raise TypeError(f"options: {type(request.options).__name__}; must be a mapping")
    if request.salt is not None and not isinstance(request.salt, str):
        raise TypeError(f"salt: {type(request.salt).__name__}; must be a str or None")
    timeout = request.timeout
    if timeout is not None and (not isinstance(timeout, Real) or isinstance(timeout, bool)):
        raise TypeError(f"timeout: {type(timeout).__name__}; must be seconds or None")
    if timeout is not None and timeout != timeout:
        raise ValueError(f"timeout: {timeout}; must be seconds or None")
    hash(request.request_id)


def id_of(request: GenerationRequest) -> Hashable:
    """Its own name, if it can be one."""
    try:
        hash(request.request_id)
    except TypeError:
        return None
    return request.request_id


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Tokens of one request as they came, with `stream=True`: one, or several where drafts were accepted."""

    request_id: Hashable
    tokens: list[int]


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """A request that is done.

    Attributes:
        request_id: of the request, or its number.
        request: as it was given.
        sequences: int64 `[rows, tokens]` on the model's device, what `generate` returns for this request alone; fewer
            tokens where it was cancelled, timed out or failed, the prompt alone where it never ran.
        num_prompt_tokens: tokens of the prompt; where an encoder has it, those that the decoder began with.
        finish_reason: "eos", "length" (`max_length`), "stop" (another criterion), "cancelled", "timeout" or "error".
        error: what was raised for this request; None without an error. Its traceback leaves the frames out that would
            keep logits alive.
        scores, logits: float32 `[1, vocabulary]` for each new token, where the config has `return_dict_in_generate` and
            `output_scores` or `output_logits`; else None.
        time_to_first_token: seconds from when the request was taken from the requests; None without a token.
        seconds: from then until it was done.
        num_preemptions: how often it lost its blocks to older requests, and had them filled again later.
        num_cached_tokens: tokens of the prompt that were remembered and not computed.
    """

    request_id: Hashable
    request: GenerationRequest
    sequences: Tensor
    num_prompt_tokens: int
    finish_reason: FinishReason
    error: Exception | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    time_to_first_token: float | None = None
    seconds: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def new_tokens(self) -> Tensor:
        """int64 `[rows, new tokens]`."""
        return self.sequences[:, self.num_prompt_tokens :]
