"""A transformer of one's own on `torch.ops.paged` alone: prefill and decode, checked against dense attention.

    python examples/custom_model.py

Nothing here needs the transformers library. The weights are random; what counts is where keys and values go.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import torch_paged

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 128, 3, 4, 2, 32
BLOCK_SIZE, NUM_BLOCKS = 16, 64


class Cache:
    """One key and one value cache per layer, and which blocks each sequence has."""

    def __init__(self, num_seqs: int) -> None:
        self.layers = [
            torch_paged.ops.empty_cache(
                NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.float32, device=torch.device("cpu")
            )
            for _ in range(LAYERS)
        ]
        self.blocks: list[list[int]] = [[] for _ in range(num_seqs)]
        self.lengths = [0] * num_seqs
        self.free = list(range(NUM_BLOCKS))

    def append(self, new: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Make room for `new[i]` tokens of sequence i; return their slots, the block table and the lengths."""
        slots = []
        for i, count in enumerate(new):
            for position in range(self.lengths[i], self.lengths[i] + count):
                if position % BLOCK_SIZE == 0:
                    self.blocks[i].append(self.free.pop())
                slots.append(self.blocks[i][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            self.lengths[i] += count
        width = max(map(len, self.blocks))
        table = [row + [-1] * (width - len(row)) for row in self.blocks]
        return (
            torch.tensor(slots),
            torch.tensor(table, dtype=torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
        )


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(rms_norm(x, (WIDTH,))).view(len(x), -1, HEAD_DIM)
        return qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.flatten(1))
        return x + self.down(silu(self.up(rms_norm(x, (WIDTH,)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, sequences: list[Tensor], cache: Cache) -> Tensor:
        """New tokens of every sequence, of any lengths, packed into one row: prefill and decode are the same call.

        Returns the logits after each sequence's last token, `[num_seqs, VOCABULARY]`.
        """
        new = [len(tokens) for tokens in sequences]
        slots, block_table, seq_lens = cache.append(new)
        cu_seqlens_q = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        x = self.embed(torch.cat(sequences))
        for layer, (key_cache, value_cache) in zip(self.layers, cache.layers, strict=True):
            query, key, value = layer.split(x)
            torch.ops.paged.reshape_and_cache(key, value, key_cache, value_cache, slots)
            attended = torch.ops.paged.attention(
                query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max(new)
            )
            x = layer.finish(x, attended)
        return x[cu_seqlens_q[1:].long() - 1] @ self.embed.weight.T

    def dense(self, tokens: Tensor) -> Tensor:
        """The logits of one whole sequence without a cache, `[tokens, VOCABULARY]`."""
        x = self.embed(tokens)
        for layer in self.layers:
            query, key, value = (part.transpose(0, 1)[None] for part in layer.split(x))
            attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            x = layer.finish(x, attended[0].transpose(0, 1))
        return x @ self.embed.weight.T


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    sequences = [torch.randint(VOCABULARY, (length,)) for length in (5, 37, 16)]
    cache = Cache(len(sequences))

    logits = model(sequences, cache)
    for _ in range(20):
        new = list(logits.argmax(1, keepdim=True))
        sequences = [torch.cat(pair) for pair in zip(sequences, new, strict=True)]
        logits = model(new, cache)

    dense = torch.stack([model.dense(tokens)[-1] for tokens in sequences])
    torch.testing.assert_close(logits, dense)
    used = NUM_BLOCKS - len(cache.free)
    print(f"{sum(map(len, sequences))} tokens of {len(sequences)} sequences in {used} blocks of {BLOCK_SIZE}")
    print(f"largest difference from dense attention: {(logits - dense).abs().max():.1e}")


argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
main()
