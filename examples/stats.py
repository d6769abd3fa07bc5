"""What `handle.stats()` tells, beside what stock's cache takes for the same call.

    python examples/stats.py --samples 4 --block-size 32 --model FOLDER_OR_HUB_ID

The call is one for samples of two prompts, a short and a long one; without options, of the demo's small model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
PROMPTS = [
    "The whale",
    "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--samples", type=int, default=4, help="of each of two prompts")
parser.add_argument("--max-new-tokens", type=int, default=30)
parser.add_argument("--block-size", type=int, default=16, choices=[1, 2, 4, 8, 16, 32, 64, 128, 256])
args = parser.parse_args()
if args.samples < 1 or args.max_new_tokens < 1:
    parser.error("--samples and --max-new-tokens must be at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
options = {
    "do_sample": True,
    "num_return_sequences": args.samples,
    "max_new_tokens": args.max_new_tokens,
    "return_dict_in_generate": True,  # the output then holds the cache, and with it the blocks
}
set_seed(0)
stock = model.generate(**inputs, **options)
stock_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.past_key_values.layers)

handle = torch_paged.patch(model, block_size=args.block_size, max_memory="1GiB")
set_seed(0)
output = model.generate(**inputs, **options)
held = handle.stats()
del output  # and with it the cache: its blocks are free
after = handle.stats()

print(f"{'':18}{'output held':>12}{'deleted':>12}")
for name, meaning in {
    "blocks_total": "what max_memory has room for",
    "blocks_used": f"of {args.block_size} tokens each",
    "blocks_shared": "of these, by several samples",
    "blocks_free": "the others",
    "bytes_held": "in the used blocks",
    "bytes_useful": "of these, with a token in them",
    "peak_bytes": "the most that was held",
    "peak_blocks_shared": "the most that were shared",
}.items():
    print(f"{name:18}{getattr(held, name):12,}{getattr(after, name):12,}  {meaning}")
print(f"{'waste':18}{held.waste:12.1%}{after.waste:12.1%}  the rest of bytes_held")
print(f"{'bytes of stock':18}{stock_bytes:12,}{'':12}  each row as long as the longest, with a prompt of its own")
print(f"{'waste of stock':18}{1 - held.bytes_useful / stock_bytes:12.1%}{'':12}  padding and copies")
