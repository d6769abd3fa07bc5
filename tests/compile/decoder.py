"""A small decoder on the paged ops alone, with each way in which models write their rotary embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

import torch_paged

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 64, 48, 4, 2, 16, 4


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Llama, Qwen, Mistral and Gemma."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in GPT-J and Cohere."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def partly(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As in Phi and GPT-NeoX; with interleaved pairs in GLM."""

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = cos.shape[-1]
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)

    return rotated


Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
# The function, its rotary size, and whether a pair's two elements lie half of that apart.
ROTATIONS: dict[str, tuple[Rotate, int, bool]] = {
    "half split": (half_split, HEAD_DIM, True),
    "interleaved": (interleaved, HEAD_DIM, False),
    "half split, partly": (partly(half_split), HEAD_DIM // 2, True),
    "interleaved, partly": (partly(interleaved), HEAD_DIM // 2, False),
}


def angles(rotation: str, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of `[batch, tokens]` positions, `[batch, tokens, rotary_dim]`."""
    _, rotary_dim, apart = ROTATIONS[rotation]
    frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    turns = positions[..., None].float() * frequencies
    turns = torch.cat((turns, turns), -1) if apart else turns.repeat_interleave(2, -1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


class Layer(nn.Module):
    def __init__(self, rotation: str, bias: bool) -> None:
        super().__init__()
        self.rotation = rotation
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=bias)
        self.k = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=bias)
        self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=bias)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, caches: tuple[Tensor, Tensor], step: Step) -> Tensor:
        """`x` is `[batch, tokens, WIDTH]`, laid out as in transformers: heads before tokens."""
        normed = rms_norm(x, (WIDTH,))
        query, key, value = (
            project(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        # One angle for all heads, broadcast.
        positions = step.seq_lens[:, None] - 1
        cos, sin = (angle[:, None] for angle in angles(self.rotation, positions, key.dtype))
        rotate, _, _ = ROTATIONS[self.rotation]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
        torch.ops.paged.reshape_and_cache(key, value, *caches, step.slot_mapping)
        attended = torch.ops.paged.attention(query, *caches, step.block_table, step.seq_lens, step.cu_seqlens_q, 1)
        x = x + self.out(attended.view(*x.shape[:2], -1))
        normed = rms_norm(x, (WIDTH,))
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


class Step:
    """Where the new tokens of one decode step go: one token for each sequence."""

    def __init__(self, seq_lens: list[int], width: int = 4) -> None:
        """`seq_lens` counts the new tokens; sequence `i` has the blocks from `i * width` on."""
        batch = len(seq_lens)
        self.block_table = torch.arange(batch * width, dtype=torch.int32).view(batch, width)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        self.cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)
        self.slot_mapping = torch.arange(batch) * width * BLOCK_SIZE + self.seq_lens.long() - 1


class Decoder(nn.Module):
    def __init__(self, *rotations: str, bias: bool = False) -> None:
        """One layer for each of the names in ROTATIONS; two of Llama's without any."""
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(rotation, bias) for rotation in rotations or ["half split"] * 2)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]], step: Step) -> Tensor:
        """`tokens` is `[batch, 1]`; logits `[batch, 1, VOCABULARY]`."""
        x = self.embed(tokens)
        for layer, pair in zip(self.layers, caches, strict=True):
            x = layer(x, pair, step)
        return self.head(x)

    def new_caches(self, num_blocks: int = 16, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        caches = [
            torch_paged.ops.empty_cache(num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype, device="cpu")
            for _ in self.layers
        ]
        for cache in (each for pair in caches for each in pair):
            cache.fill_(torch.nan)
        return caches


def decode(model: nn.Module, caches: list[tuple[Tensor, Tensor]], batch: int = 2, steps: int = 5) -> Tensor:
    """The logits of greedy steps from given first tokens on, `[batch, steps, VOCABULARY]`."""
    # No view, as the ones that follow: where sizes vary, Dynamo guards on the base of a view.
    tokens = torch.arange(1, batch + 1)[:, None].clone()
    logits = []
    for length in range(1, steps + 1):
        logits.append(model(tokens, caches, Step([length] * batch)))
        tokens = logits[-1].argmax(-1)
    return torch.cat(logits, 1)
