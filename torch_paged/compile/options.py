"""CompileOptions: what the backend does to a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class CompileOptions:
    """Options of `torch.compile(model, backend="torch_paged", options=...)`; a dict with the same keys does too.

    Args:
        inductor: settings of `torch._inductor.config` for this compilation, on top of those of `mode`.

    Raises:
        TypeError: an option does not exist.
    """

    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: "CompileOptions | Mapping[str, Any] | None") -> "CompileOptions":
        """Return the options that a caller of `torch.compile` gave, whichever way."""
        if options is None:
            return cls()
        if isinstance(options, CompileOptions):
            return options
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"options: {name}; must be of {', '.join(known)}")
        return cls(**options)
