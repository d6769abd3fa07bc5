"""Lengths of requests drawn at random, with the means of the data sets that the PagedAttention paper served."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LengthMix:
    """Prompt and output lengths, each geometric: the distribution that assumes nothing but the mean.

    The paper tells the means alone (arXiv 2309.06180, section 6.1, figure 11).
    """

    name: str
    mean_prompt: float
    mean_output: float

    def draw(self, rng: np.random.Generator, count: int, longest: int) -> tuple[Ints, Ints]:
        """Lengths of `count` requests, each at least 1; what passes `longest` in all is cut off.

        Returns:
            prompt_lens: int64 `[count]`.
            output_lens: int64 `[count]`.
        """
        prompt_lens = np.minimum(rng.geometric(1 / self.mean_prompt, count), longest - 1)
        output_lens = np.minimum(rng.geometric(1 / self.mean_output, count), longest - prompt_lens)
        return prompt_lens.astype(np.int64), output_lens.astype(np.int64)


MIXES = {mix.name: mix for mix in (LengthMix("alpaca", 19.31, 58.45), LengthMix("sharegpt", 161.31, 337.99))}
