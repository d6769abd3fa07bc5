"""Patch a model, and call generate as before: the same tokens, and no memory for padding.

    python examples/generate.py --prompt "Call me Ishmael." "The whale" --model FOLDER_OR_HUB_ID

Without options: three openings of novels, and the small model of the demo.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
PROMPTS = [
    "The whale",
    "It is a truth universally acknowledged, that",
    "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="rows of the batch")
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()
if not all(args.prompt) or args.max_new_tokens < 1:
    parser.error("--prompt must not be empty, --max-new-tokens must be at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

inputs = tokenizer(args.prompt, padding=True, return_tensors="pt")
options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

# The line that changes: from here on, generate keeps its keys and values in blocks of a pool.
handle = torch_paged.patch(model)

output = model.generate(**inputs, **options)
for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print("-", " ".join(text.split()))

# And back: the model is exactly as it was.
handle.unpatch()

stock = model.generate(**inputs, **options, return_dict_in_generate=True)
stock_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.past_key_values.layers)
print("same tokens as stock:", torch.equal(output, stock.sequences))
print(f"paged: {handle.stats().peak_bytes / 1024:.0f} KiB of keys and values at most")
print(f"stock: {stock_bytes / 1024:.0f} KiB, with the padding of {len(output)} rows to the longest")
