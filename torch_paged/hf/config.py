"""PagedConfig: every knob of a patched model, in one frozen dataclass."""

from dataclasses import dataclass

from torch_paged.memory import parse_max_memory
from torch_paged.ops.cache_layout import check_block_size


@dataclass(frozen=True)
class PagedConfig:
    """The knobs of `patch(model, **knobs)`, `paged(model, **knobs)` and `PagedCache(config, **knobs)`.

    Attributes:
        block_size: tokens per block, a power of two from 1 to 256. Small blocks waste less, 16 costs no speed.
        max_memory: bound of the KV pool on each device: bytes (int), a size ("2GiB", "500MB"), or a fraction of the
            device's or machine's memory (float in (0, 1]). None takes half of what is free at first use. Memory is
            committed only as it is used.
        prefix_caching: keep the full blocks of prompts and answers after `generate`, for later prompts that begin with
            the same tokens; given up when blocks run out, and when the weights change.
        salt: blocks remembered under one salt are not found under another: a tenant cannot find out, by how fast a
            prompt is answered, whether others sent it.
        strict: raise instead of warning where a model or a call cannot run natively.

    Raises:
        ValueError, TypeError: a knob is out of range or of the wrong type.
    """

    block_size: int = 16
    max_memory: int | float | str | None = None
    prefix_caching: bool = False
    salt: str = ""
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool):
            raise TypeError(f"block_size: {type(self.block_size).__name__}; must be an int")
        check_block_size(self.block_size)
        for name, wanted in (("prefix_caching", bool), ("salt", str), ("strict", bool)):
            if not isinstance(value := getattr(self, name), wanted):
                raise TypeError(f"{name}: {type(value).__name__}; must be a {wanted.__name__}")
        parse_max_memory(self.max_memory)
