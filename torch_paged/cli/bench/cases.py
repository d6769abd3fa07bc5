"""The shapes that `bench ops` measures, and how a user names others."""

import argparse
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Sequences of one call that are alike: each brings `query_len` new tokens, which end a context of `context`."""

    count: int
    query_len: int
    context: int


@dataclass(frozen=True)
class Case:
    """One call of the attention op."""

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[Group, ...]

    @property
    def query_lens(self) -> list[int]:
        return [group.query_len for group in self.groups for _ in range(group.count)]

    @property
    def contexts(self) -> list[int]:
        return [group.context for group in self.groups for _ in range(group.count)]

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of key and value that the call has to read."""
        return 2 * sum(self.contexts) * self.num_kv_heads * self.head_dim * dtype.itemsize

    def flops(self) -> int:
        """Multiplications and additions of the two matrix products, over the visible (causal) keys."""
        visible = sum(q * context - q * (q - 1) // 2 for q, context in zip(self.query_lens, self.contexts, strict=True))
        return 4 * visible * self.num_heads * self.head_dim

    def __str__(self) -> str:
        groups = " + ".join(f"{group.count}×{group.query_len}/{group.context}" for group in self.groups)
        return f"{self.kind} {self.num_heads}/{self.num_kv_heads}×{self.head_dim} {groups}"


DEFAULT_CASES = (
    Case("decode", 32, 8, 128, (Group(1, 1, 4096),)),
    Case("decode", 32, 8, 128, (Group(8, 1, 2048),)),
    Case("decode", 32, 8, 128, (Group(32, 1, 1024),)),
    Case("decode", 14, 2, 64, (Group(16, 1, 2048),)),
    Case("decode", 32, 8, 128, (Group(1, 1, 32768),)),
    Case("prefill", 32, 8, 128, (Group(1, 512, 512),)),
    Case("prefill", 32, 8, 128, (Group(1, 2048, 2048),)),
    Case("chunked", 32, 8, 128, (Group(1, 256, 4096),)),
    Case("mixed", 32, 8, 128, (Group(7, 1, 1024), Group(1, 256, 1024))),
)
KINDS = tuple(dict.fromkeys(case.kind for case in DEFAULT_CASES))


def parse_case(text: str) -> Case:
    """Read `batch,heads,kv_heads,head_dim,context[,query_len]`.

    Raises:
        argparse.ArgumentTypeError: the text is no such case.
    """
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (5, 6) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}; must be batch,heads,kv_heads,head_dim,context[,query_len], each a positive integer"
        )
    count, num_heads, num_kv_heads, head_dim, context, *rest = numbers
    query_len = rest[0] if rest else 1
    if num_heads % num_kv_heads:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {num_heads} heads; must be a multiple of the {num_kv_heads} kv_heads"
        )
    if query_len > context:
        raise argparse.ArgumentTypeError(f"{text!r}: query_len {query_len}; must be at most the context, {context}")
    kind = "decode" if query_len == 1 else "prefill" if query_len == context else "chunked"
    return Case(kind, num_heads, num_kv_heads, head_dim, (Group(count, query_len, context),))
