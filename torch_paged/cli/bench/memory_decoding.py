"""What samples and beams of one prompt share while they decode, step by step through the block tables."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from torch_paged.cli.bench.kv_geometry import KVGeometry
from torch_paged.cli.bench.length_mixes import Ints
from torch_paged.cli.bench.memory_scenarios import Sharing
from torch_paged.memory import BlockTables

# Which beam each beam goes on from: given the requests that still decode, int64 `[requests, width]`.
Parents = Callable[[Ints], Ints]


def decode(geometry: KVGeometry, prompt_lens: Ints, output_lens: Ints, width: int, parents: Parents | None) -> Sharing:
    """Decode every request in `width` sequences that fork from its prompt, a token a step until its output is whole.

    Args:
        geometry: of the pool.
        prompt_lens: int64 `[requests]`.
        output_lens: int64 `[requests]`.
        width: samples or beams of a request.
        parents: called before each step but the first; None = every sequence goes on from itself.

    Returns:
        Blocks summed over the steps. Shared: what the allocator counts as used.
    """
    num_seqs = len(prompt_lens) * width
    pool = geometry.pool_for(width * int((prompt_lens + output_lens).sum()), num_seqs)
    tables = BlockTables(pool, len(prompt_lens))
    tables.append(prompt_lens)
    tables.select(np.repeat(np.arange(len(prompt_lens)), width))
    requests = np.arange(len(prompt_lens))
    shared = unshared = 0
    for step in range(int(output_lens.max())):
        alive = output_lens[requests] > step
        if step and parents is not None:
            beams = parents(requests[alive])
        else:
            beams = np.tile(np.arange(width), (int(alive.sum()), 1))
        if not alive.all() or (step and parents is not None):
            tables.select((np.flatnonzero(alive)[:, None] * width + beams).ravel())
        requests = requests[alive]
        # The copies of copy-on-write are taken and charged; there are no bytes to copy.
        tables.append(np.ones(tables.num_seqs, dtype=np.int64))
        shared += pool.allocator.num_used
        unshared += int((-(-tables.seq_lens // geometry.block_size)).sum())
    return Sharing(shared, unshared)


class RandomBeamSearch:
    """Beam search over next-token probabilities broken off a stick, GEM(concentration), anew at each step.

    A concentration of 1 gives the likeliest token 62 % on average and a surprise of 1 nat a token: what decides how
    soon beams die out and others fork is how sure a model is.

    Args:
        requests: how many search at once.
        width: beams of each.
        concentration: greater than 0; the greater, the less sure.
        rng: where the sticks come from.
    """

    def __init__(self, requests: int, width: int, concentration: float, rng: np.random.Generator) -> None:
        self._concentration = concentration
        self._rng = rng
        self._width = width
        # Before the first step all beams are one.
        self._scores: NDArray[np.float64] = np.full((requests, width), -np.inf)
        self._scores[:, 0] = 0
        self(np.arange(requests))

    def __call__(self, requests: Ints) -> Ints:
        """Search one step further in these requests; int64 `[requests, width]`, the beam each beam goes on from."""
        # 2 * width candidates of a beam, as generate takes them.
        shape = (len(requests), self._width, 2 * self._width)
        # What a piece leaves of its stick is 1 - Beta(1, c), whose logarithm is exponential.
        log_rest = -self._rng.standard_exponential(shape) / self._concentration
        log_piece = np.log(-np.expm1(log_rest))
        log_probs = log_piece + np.cumsum(log_rest, axis=2) - log_rest
        candidates = (self._scores[requests, :, None] + log_probs).reshape(len(requests), -1)
        best = np.argsort(-candidates, axis=1)[:, : self._width]
        self._scores[requests] = np.take_along_axis(candidates, best, axis=1)
        parents: Ints = best // (2 * self._width)
        return parents
