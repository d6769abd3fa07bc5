"""SeenMask: an attention mask that generate only appended ones to since it was read need not be read again."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class SeenMask:
    """Reading a mask makes the host wait for the device, in each step of decoding for a column of ones."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What is stored is no longer what the mask said."""
        self._mask: Tensor | None = None
        self._version = 0
        self._grown = False

    def see(self, mask: Tensor) -> None:
        """`mask`, int `[num_seqs, columns]`, was read: it shows what is stored once the call with it has run."""
        # What changes a mask made in inference mode is not counted.
        if mask.is_inference():
            self.forget()
        else:
            self._mask, self._version, self._grown = mask, mask._version, False

    def grow(self, before: Any, after: Any) -> None:
        """`after` is `before` with columns of ones appended."""
        if self._mask is not None and before is self._mask and self._mask._version == self._version:
            if after.is_inference():
                self.forget()
            else:
                self._mask, self._version, self._grown = after, after._version, True

    def shows_ones(self, mask: Any, columns: int) -> bool:
        """Whether the last of these columns are ones, and the others what is stored."""
        if self._mask is None or mask is not self._mask or not self._grown:
            return False
        return self._mask._version == self._version and int(self._mask.shape[1]) == columns
