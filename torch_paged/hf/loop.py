"""Loop: one decoding loop of stock, and what it was called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList


@dataclass(frozen=True)
class Loop:
    """A call of `_sample` or `_beam_search`.

    Attributes:
        run: it, of the model's stock class, bound; takes ids, processors, criteria and inputs.
        input_ids: int64 `[rows, columns]`, beams of a prompt one below the other.
        inputs: of the model besides, with an empty cache.
    """

    run: Callable[..., Any]
    model: PreTrainedModel
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    inputs: dict[str, Any]

    def __call__(self, **kwargs: Any) -> Any:
        """Run it as it was called."""
        return self.run(self.input_ids, self.processors, self.criteria, **self.inputs, **kwargs)

    @property
    def pad_token(self) -> int:
        pad: Any = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)
