"""PagedConfig: every knob of a patched model, in one frozen dataclass."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

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
        pack_rows: calls compute no padding: their rows stand one after the other, in passes of `max_prefill_tokens`.
            False: rows and columns as in stock; only prompts of beams and samples are shared then, and no row leaves.
        max_prefill_tokens: tokens that one forward pass of a prefill computes at most, of all rows together; longer
            prefills run as several passes, which bounds the memory of activations. At least 1. What engines call
            max_num_batched_tokens.
        share_prompts: beams, samples and rows of a batch that begin alike compute and store once what they have in
            common.
        min_shared_prefix: rows of a batch whose first so many tokens are the same compute and store these once; 0 = no
            rows but identical ones. Each level of prefixes costs a forward pass of its own.
        drop_finished_rows: rows of a batch that met their stopping criterion give their blocks back at once and are
            computed no more, where stock would go on with pad tokens for them. Their scores are zeros then.
        on_pressure: what becomes of rows of a batch that does not fit, and of requests of generate_many: "swap" copies
            their blocks to CPU memory, which `max_memory` does not count, "recompute" drops them, to be computed again
            when their turn comes, as "swap" does where the system has no memory left. Calls in several threads wait for
            blocks of one another, in CPU memory where their rows do not take turns; the one that came first goes on
            first. "error" raises PoolExhausted, which in generate_many is the result of one request.
        max_num_seqs: sequences of generate_many that run at once, at most, unless the call says otherwise.
        max_num_batched_tokens: tokens of one forward pass of generate_many, at most, likewise; at least `max_num_seqs`.
        deterministic: what a request of generate_many gets does not depend on what else runs, likewise.
        compile: compile prefills and decode steps: True with the backend "torch_paged", or a dict of arguments of
            `torch.compile`.
        fast_layers: on a CPU, layers of uncompiled passes run by `torch_paged.ops`: RMS norms of Llama's kind by
            `rms_norm`; attention of Llama's, Qwen's and Mistral's by `qkv_linear`, `rope_and_cache` and `attention`;
            linear layers by `linear`, and gate and up projections of gated MLPs by `gated_linear`, where
            these are faster: with few rows (up to 64), and on x86 CPUs with any number in bfloat16, without AMX in
            float16, and in float32 where the CPU has no AMX but fast dot products of bfloat16. False: by PyTorch,
            whose results differ in the last bits.
        huge_pages: under Linux 6.1 and newer, weights on the CPU are moved into pages of 2 MiB when the model is
            patched, in place, as products read them a quarter faster from there (2 cores of a Xeon); takes one to three
            seconds for a gigabyte, once. Not what lies in a mapped file or in memory shared with other processes, and
            not where the system is set to never use such pages.
        strict: raise instead of warning where a model or a call cannot run natively.

    Raises:
        ValueError, TypeError: a knob is out of range or of the wrong type.
    """

    block_size: int = 16
    max_memory: int | float | str | None = None
    prefix_caching: bool = False
    salt: str = ""
    pack_rows: bool = True
    max_prefill_tokens: int = 2048
    share_prompts: bool = True
    min_shared_prefix: int = 64
    drop_finished_rows: bool = True
    on_pressure: str = "swap"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    deterministic: bool = False
    compile: bool | dict[str, Any] = False
    fast_layers: bool = True
    huge_pages: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        least_of = dict(block_size=1, max_prefill_tokens=1, min_shared_prefix=0, max_num_seqs=1)
        for name, least in (least_of | {"max_num_batched_tokens": self.max_num_seqs}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: {type(value).__name__}; must be an int")
            if value < least and name != "block_size":
                raise ValueError(f"{name}: {value}; must be at least {least}")
        check_block_size(self.block_size)
        flags = ["prefix_caching", "pack_rows", "share_prompts", "drop_finished_rows", "deterministic"]
        flags += ["fast_layers", "huge_pages", "strict"]
        for name, wanted in (dict.fromkeys(flags, bool) | {"salt": str}).items():
            if not isinstance(value := getattr(self, name), wanted):
                raise TypeError(f"{name}: {type(value).__name__}; must be a {wanted.__name__}")
        if not isinstance(self.compile, (bool, dict)):
            raise TypeError(f"compile: {type(self.compile).__name__}; must be a bool or a dict")
        if isinstance(self.compile, dict):
            known = inspect.signature(torch.compile).parameters.keys() - {"model", "disable"}
            if unknown := sorted(self.compile.keys() - known):
                raise ValueError(f"compile: {', '.join(unknown)}; must be arguments of torch.compile")
        if self.on_pressure not in ("swap", "recompute", "error"):
            raise ValueError(f'on_pressure: {self.on_pressure!r}; must be "swap", "recompute" or "error"')
        parse_max_memory(self.max_memory)

    @property
    def compile_options(self) -> dict[str, Any]:
        """What `compile` gives to `torch.compile`."""
        return {"backend": "torch_paged"} | (self.compile if isinstance(self.compile, dict) else {})
