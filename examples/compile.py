"""A decode loop on `torch.ops.paged` under `torch.compile(backend="torch_paged")`, checked against the loop as written.

    python examples/compile.py

Nothing here needs the transformers library. What the backend did is logged; the weights are random.
"""

import argparse
import logging
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

import torch_paged

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 1024, 256, 4, 4, 2, 64, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], step: "Step") -> Tensor:
        normed = rms_norm(x, (WIDTH,))
        query, key, value = (
            project(normed).view(len(x), -1, HEAD_DIM) for project in (self.query, self.key, self.value)
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        torch.ops.paged.reshape_and_cache(key, value, *cache, step.slots)
        attended = torch.ops.paged.attention(query, *cache, step.block_table, step.seq_lens, step.cu_seqlens_q, 1)
        x = x + self.out(attended.flatten(1))
        normed = rms_norm(x, (WIDTH,))
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Step:
    """One new token for each sequence; the tensors stay, so that one graph serves all steps."""

    def __init__(self, num_seqs: int, max_seq_len: int) -> None:
        width = -(-max_seq_len // BLOCK_SIZE)
        self.block_table = torch.arange(num_seqs * width, dtype=torch.int32).view(num_seqs, width)
        self.seq_lens = torch.zeros(num_seqs, dtype=torch.int32)
        self.cu_seqlens_q = torch.arange(num_seqs + 1, dtype=torch.int32)
        self.slots = torch.zeros(num_seqs, dtype=torch.int64)

    def advance(self) -> None:
        blocks = self.block_table.gather(1, self.seq_lens[:, None].long() // BLOCK_SIZE)[:, 0]
        self.slots.copy_(blocks.long() * BLOCK_SIZE + self.seq_lens % BLOCK_SIZE)
        self.seq_lens.add_(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]], step: Step) -> Tensor:
        """Logits `[num_seqs, VOCABULARY]` after one new token each, `[num_seqs]`."""
        frequencies = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        turns = (step.seq_lens[:, None] - 1) * torch.cat((frequencies, frequencies))
        x, cos, sin = self.embed(tokens), turns.cos()[:, None], turns.sin()[:, None]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, cache, step)
        return self.head(rms_norm(x, (WIDTH,)))


@torch.no_grad()
def decode(forward: nn.Module, num_seqs: int, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy tokens `[num_seqs, new_tokens]`, and seconds for each step after the first."""
    step = Step(num_seqs, new_tokens)
    caches = [
        torch_paged.ops.empty_cache(
            step.block_table.numel(), BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.float32, device=torch.device("cpu")
        )
        for _ in range(LAYERS)
    ]
    tokens = [torch.arange(num_seqs)]
    for i in range(new_tokens):
        if i == 1:
            started = time.perf_counter()
        step.advance()
        tokens.append(forward(tokens[-1], caches, step).argmax(-1))
    return torch.stack(tokens[1:], 1), (time.perf_counter() - started) / (new_tokens - 1)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("torch_paged.compile").setLevel(logging.INFO)
    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, backend="torch_paged", fullgraph=True)
    expected, eager = decode(model, 4, 50)
    tokens, seconds = decode(compiled, 4, 50)
    print(f"same tokens: {torch.equal(tokens, expected)}")
    print(f"a step takes {1e3 * seconds:.2f} ms, {1e3 * eager:.2f} ms as written")


argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
main()
