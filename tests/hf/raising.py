"""A logits processor that raises in the middle of decoding."""

from torch import Tensor


class Raises:
    """Raises ZeroDivisionError at its n-th call; before that scores stay as they are."""

    def __init__(self, at: int = 1) -> None:
        self.at = at

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.at -= 1
        if self.at == 0:
            raise ZeroDivisionError("planted")
        return scores
