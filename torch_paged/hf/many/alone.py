"""A request by itself, through the model's own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from torch_paged.hf.many.prepare import arguments, input_device
from torch_paged.hf.many.sequence import Sequence


def generate_alone(
    model: PreTrainedModel,
    sequence: Sequence,
    assistant: PreTrainedModel | None,
    stop: Callable[[], bool],
    tell: Callable[[list[int]], None],
) -> Any:
    """What `model.generate` returns for the request, after `torch.manual_seed` of its seed.

    Args:
        assistant: as of `generate`.
        stop: asked after every token whether to stop there.
        tell: gets new tokens as they come, where `generate` streams.

    Torch's global generators are what they were, afterwards.
    """
    device = input_device(model)
    named = arguments(sequence.request, sequence.tokens[: sequence.num_prompt_tokens], device)
    named["stopping_criteria"].append(_Stop(stop))
    beams = named.get("num_beams") or getattr(sequence.request.generation_config, "num_beams", None)
    streams = (beams or model.generation_config.num_beams or 1) == 1
    if streams:
        named["streamer"] = _Streamer(tell)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(sequence.seed)
        return model.generate(**named, assistant_model=assistant)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stop(), device=input_ids.device)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Tells of a single row as it grows; the prompt comes first."""

    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self._tell = tell
        self._prompt = True

    def put(self, value: Tensor) -> None:
        one_row = len(value) == 1 if value.ndim == 1 else value.ndim == 2 and len(value) == 1
        if one_row and not self._prompt:
            self._tell(value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        """Nothing is kept back."""
