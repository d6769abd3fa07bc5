"""ChosenBeams: continuations that a beam search has drawn already are drawn again when it begins anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ChosenBeams:
    """What each step of `_beam_search` with `do_sample` has drawn: see `Chosen` for why it stays.

    Attributes:
        steps: int64 `[prompts, beams_to_keep]` each, places among the continuations of all beams of a prompt.
    """

    def __init__(self, steps: list[Tensor] | None = None) -> None:
        self.steps = steps or []
        self._done = 0

    def of(self, prompts: slice) -> ChosenBeams:
        """Those of some prompts, from the first step on."""
        return ChosenBeams([step[prompts] for step in self.steps])

    def choose(self, stock: Callable[..., Any], accumulated_log_probs: Tensor, **kwargs: Any) -> Any:
        """`_get_top_k_continuations`, of which `stock` is the method of the model's class."""
        step, self._done = self._done, self._done + 1
        if step < len(self.steps):
            places = self.steps[step]
            ranks = torch.arange(places.shape[1], 0, -1, device=places.device, dtype=accumulated_log_probs.dtype)
            ranked = torch.full_like(accumulated_log_probs, -torch.inf).scatter(1, places, ranks.expand(places.shape))
            _, *chosen = stock(accumulated_log_probs=ranked, **kwargs | {"do_sample": False})
            return accumulated_log_probs.gather(1, places), *chosen
        scores, sequences, beam_indices = stock(accumulated_log_probs=accumulated_log_probs, **kwargs)
        num_beams = kwargs["num_beams"]
        beams = beam_indices[:, :, kwargs["cur_len"] - kwargs["decoder_prompt_len"]] % num_beams
        tokens = sequences[:, :, kwargs["cur_len"]]
        self.steps.append(beams * (accumulated_log_probs.shape[1] // num_beams) + tokens)
        return scores, sequences, beam_indices


@contextmanager
def choosing(chosen: ChosenBeams | None) -> Iterator[None]:
    """`chosen` is what the beam search of this thread draws, or has drawn."""
    outer, _current.chosen = _current.chosen, chosen
    try:
        yield
    finally:
        _current.chosen = outer


def continuations(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_get_top_k_continuations` of a patched model."""
    chosen = _current.chosen
    return stock(*args, **kwargs) if chosen is None or args else chosen.choose(stock, **kwargs)


class _Current(threading.local):
    chosen: ChosenBeams | None = None


_current = _Current()
