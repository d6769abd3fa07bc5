"""Beam search: beams share the blocks of the text they have in common, and a reorder moves no keys or values.

    python examples/beams.py --beams 8 --prompt "The whale" --model FOLDER_OR_HUB_ID

Without options: 4 beams of the small model of the demo.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
PROMPT = (
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite some "
    "of the best blessings of existence;"
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--prompt", default=PROMPT)
parser.add_argument("--beams", type=int, default=4)
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()
if not args.prompt or args.beams < 2 or args.max_new_tokens < 1:
    parser.error("--prompt must not be empty, --beams must be at least 2, --max-new-tokens at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")

inputs = tokenizer(args.prompt, return_tensors="pt")
options = {
    "num_beams": args.beams,
    "num_return_sequences": args.beams,
    "max_new_tokens": args.max_new_tokens,
    "do_sample": False,
    "output_scores": True,
    "return_dict_in_generate": True,  # the output then holds the cache, and with it the blocks
}
with torch_paged.paged(model) as handle:
    output = model.generate(**inputs, **options)
    stats = handle.stats()

new = output.sequences[:, inputs["input_ids"].shape[1] :]
for score, text in zip(output.sequences_scores, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
    print(f"{score:.3f} {' '.join(text.split())}")

stock = model.generate(**inputs, **options)
stock_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.past_key_values.layers)
print("same tokens as stock:", torch.equal(output.sequences, stock.sequences))
print(f"paged: {stats.blocks_used} blocks at the end, {stats.blocks_shared} of them shared by beams")
print(f"paged: {stats.peak_bytes / 1024:.0f} KiB of keys and values at most")
print(f"stock: {stock_bytes / 1024:.0f} KiB, as each of {args.beams} beams has all its keys and values to itself")
