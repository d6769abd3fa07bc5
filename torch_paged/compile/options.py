"""CompileOptions: what the backend does to a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class CompileOptions:
    """Options of `torch.compile(model, backend="torch_paged", options=...)`; a dict with the same keys does too.

    Args:
        fuse_rope: rotate queries and keys in the op that writes keys and values, `rope_and_cache`.
        merge_projections: run linear layers that share an input as one. Needs weights that are frozen, as they are
            where gradients are off when the graph is captured; takes memory for a second copy of these weights.
        prepack: on a CPU, run linear layers over packed weights, `packed_linear`. As above; one copy serves both.
            Layers of more than 64 rows run by `linear` and `gated_linear`, over the weights as they are, where these
            are fast.
        huge_pages: under Linux 6.1 and newer, merged and packed weights on a CPU lie in pages of 2 MiB, where products
            read them a quarter faster (2 cores of a Xeon).
        choose_early: where a graph chooses tokens, `hidden_states[:, logits_to_keep]`, compute the others only up to
            where tokens last see one another: the last layer's attention.
        cuda_graphs: replay graphs as CUDA graphs, one for each combination of sizes: those whose sizes are all known,
            and decode steps, whose batch and table width should be rounded up to few. Caches have to stay where they
            are: `torch._dynamo.mark_static_address`.
        cache_copies: what to do when a compiled graph would copy a paged cache: "raise", "warn" or "allow".
        inductor: settings of `torch._inductor.config` for this compilation, on top of all others.

    Raises:
        TypeError: an option does not exist.
        ValueError: `cache_copies` is none of the three.
    """

    fuse_rope: bool = True
    merge_projections: bool = True
    prepack: bool = True
    huge_pages: bool = True
    choose_early: bool = True
    cuda_graphs: bool = True
    cache_copies: Literal["raise", "warn", "allow"] = "raise"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cache_copies not in ("raise", "warn", "allow"):
            raise ValueError(f"cache_copies: {self.cache_copies!r}; must be 'raise', 'warn' or 'allow'")

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
