"""The state of the generators that dropout draws from: a call that is run again must draw the same."""

from __future__ import annotations

import torch


class RandomState:
    """Taken when it is made; `restore` goes back to it."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        on_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if on_cuda else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
