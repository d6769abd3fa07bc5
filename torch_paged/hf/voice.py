"""Voice: says why a model or cache is not read in place, each reason once."""

from __future__ import annotations

import logging
import threading
import weakref

from torch_paged.hf.support import Support

logger = logging.getLogger("torch_paged")


class Voice:
    """Says each reason once for one owner: a warning, or with `strict` an error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._said: set[str] = set()

    @classmethod
    def of(cls, owner: object, name: str) -> Voice:
        """The voice of a model or config, one for all its patches, caches and threads as long as it lives."""
        with _lock:
            voice = _voices.get(id(owner))
            if voice is None:
                voice = _voices[id(owner)] = cls(name)
                weakref.finalize(owner, _voices.pop, id(owner), None).atexit = False
            return voice

    def say(self, support: Support, strict: bool) -> None:
        """Raises: ValueError if `strict`, naming class, reason and what strict=False would do."""
        text = f"{self.name}: {support.reason}; {support.path.value}"
        if strict:
            raise ValueError(f"{text} (strict=False runs it so)")
        self._once(support.reason, text)

    def tell(self, reason: str, consequence: str) -> None:
        """A warning about what runs natively, and yet not as it could."""
        self._once(reason, f"{self.name}: {reason}; {consequence}")

    def _once(self, reason: str, text: str) -> None:
        with _lock:
            new = reason not in self._said
            self._said.add(reason)
        if new:
            logger.warning(text)


_lock = threading.Lock()
_voices: dict[int, Voice] = {}
