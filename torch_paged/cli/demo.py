"""Generates text with a model as it is and patched, side by side: same tokens, speed, KV memory."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from torch_paged.cli.arguments import DTYPES, at_least
from torch_paged.cli.demo_prompts import PROMPTS
from torch_paged.cli.env import collect
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import print_environment, progress, wide_console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from torch_paged.cli.demo_workloads import Comparison

PACKAGED_MODEL = Path(__file__).parent / "demo_model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="folder or hub id of a causal language model; default: a small one in the package"
    )
    parser.add_argument("--prompt", nargs="+", help="prompts; the first alone is used for all but the ragged batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="only float32 promises stock's tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=at_least(1), default=len(PROMPTS), help="rows of the ragged batch")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128)
    parser.add_argument(
        "--threads", type=at_least(1), help="of PyTorch; default: 1 for the packaged model, else its own"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = available_device(args.device)
    # In a model as small as the packaged one, threads only wait for one another.
    if threads := args.threads or (1 if args.model is None else None):
        torch.set_num_threads(threads)
    model, tokenizer = load(args.model, DTYPES[args.dtype], device)
    prompts = args.prompt or list(PROMPTS)
    require_fitting_prompts(prompts, tokenizer, model.config, args.max_new_tokens)
    comparisons = compare_all(model, tokenizer, prompts, args.batch, args.max_new_tokens)
    settings = {
        "model": args.model or "packaged",
        "dtype": args.dtype,
        "device": args.device,
        "max_new_tokens": args.max_new_tokens,
    }
    if args.json:
        results = [comparison.as_json() for comparison in comparisons]
        print(json.dumps({"environment": collect(), **settings, "results": results}, indent=2))
    else:
        print_comparisons(comparisons, settings)
    return 0


def available_device(name: str) -> torch.device:
    """Return the device, if PyTorch has it here and the ops have kernels for it."""
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: not available here ({in_one_line(error)})") from None
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, device.type)
    if key not in ("CPU", "CUDA") or not torch._C._dispatch_has_kernel_for_dispatch_key("paged::attention", key):
        raise CommandError(f"--device {name}: torch_paged has no attention kernel for it; must be cpu")
    return device


def load(
    name: str | None, dtype: torch.dtype, device: torch.device
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a model and its tokenizer, which pads on the left.

    Raises:
        CommandError: transformers is missing, or there is no such model, or it is no causal language model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise CommandError("transformers is not installed; run `pip install transformers`") from None
    logging.set_verbosity_error()
    if name is None:
        # Loads in an instant; a download or a large model shows its progress.
        logging.disable_progress_bar()
    source = name or str(PACKAGED_MODEL)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise CommandError(f"--model {source}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    except Exception as error:
        # A folder can be broken in as many ways as there are libraries that read it.
        raise CommandError(f"--model {source}: {in_one_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def require_fitting_prompts(
    prompts: list[str], tokenizer: "PreTrainedTokenizerBase", config: Any, max_new_tokens: int
) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    for prompt in prompts:
        tokens = len(tokenizer(prompt)["input_ids"])
        if tokens == 0:
            raise CommandError(f"--prompt {prompt!r}: has no tokens; must have at least one")
        if longest is not None and tokens + max_new_tokens > longest:
            raise CommandError(
                f"--max-new-tokens {max_new_tokens}: after a prompt of {tokens} tokens; "
                f"must be at most {max(0, longest - tokens)}, as the model has {longest} positions"
            )


def compare_all(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[str], batch: int, max_new_tokens: int
) -> "list[Comparison]":
    from torch_paged.cli.demo_workloads import compare, workloads

    comparisons = []
    with progress() as bar:
        warm_up = bar.add_task("warm-up", total=None)
        compare(model, tokenizer, workloads(prompts, 1)[0], min(4, max_new_tokens), lambda: None)
        bar.remove_task(warm_up)
        for workload in workloads(prompts, batch):
            task = bar.add_task(workload.name, total=2 * max_new_tokens)
            comparisons.append(compare(model, tokenizer, workload, max_new_tokens, partial(bar.advance, task)))
            bar.update(task, completed=2 * max_new_tokens)
    return comparisons


def print_comparisons(comparisons: "list[Comparison]", settings: dict[str, Any]) -> None:
    console = wide_console()
    for comparison in comparisons:
        print_text(console, comparison)
    table = Table(title="model.generate, stock and paged")
    table.add_column("")
    table.add_column("same tokens")
    for header in (
        "tokens/s\nstock",
        "\npaged",
        "peak KV\nstock",
        "\npaged",
        "waste\nstock",
        "\npaged",
        "blocks\nshared",
    ):
        table.add_column(header, justify="right")
    for comparison in comparisons:
        table.add_row(
            comparison.workload.name,
            "yes" if comparison.same_tokens else "NO",
            f"{comparison.stock.tokens_per_s:.0f}",
            f"{comparison.paged.tokens_per_s:.0f}",
            as_bytes(comparison.stock_kv_bytes),
            as_bytes(comparison.stats.peak_bytes),
            f"{comparison.stock_waste:.0%}",
            f"{comparison.stats.waste:.0%}",
            str(comparison.stats.peak_blocks_shared),
        )
    console.print(table)
    console.print(
        "Waste of stock: padding, and keys and values that several rows hold each for itself.", highlight=False
    )
    print_environment(console, settings)


def print_text(console: Console, comparison: "Comparison") -> None:
    """Show the last row; both versions where they differ."""
    console.rule(comparison.workload.name)
    versions = (
        {"": comparison.texts[-1]}
        if comparison.same_tokens
        else {
            "stock: ": comparison.texts[-1],
            "paged: ": comparison.paged_texts[-1],
        }
    )
    for name, text in versions.items():
        console.print(name + text.strip(), markup=False, highlight=False)


def as_bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
