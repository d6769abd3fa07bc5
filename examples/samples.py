"""Many samples of one prompt: it is computed once and kept once, and each sample adds only its own tokens.

    python examples/samples.py --samples 32 --temperature 0.7 --prompt "The whale" --model FOLDER_OR_HUB_ID

Without options: 8 samples of the small model of the demo.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
PROMPT = (
    "Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever "
    "I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet, I"
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--prompt", default=PROMPT)
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--temperature", type=float, default=0.8)
parser.add_argument("--max-new-tokens", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
if not args.prompt or args.samples < 1 or args.max_new_tokens < 1 or args.temperature <= 0:
    parser.error("--prompt must not be empty, --samples and --max-new-tokens at least 1, --temperature above 0")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")

inputs = tokenizer(args.prompt, return_tensors="pt")
prompt_length = inputs["input_ids"].shape[1]
options = {
    "num_return_sequences": args.samples,
    "do_sample": True,
    "temperature": args.temperature,
    "max_new_tokens": args.max_new_tokens,
    "return_dict_in_generate": True,  # the output then holds the cache, and with it the blocks
}
with torch_paged.paged(model) as handle:
    set_seed(args.seed)
    output = model.generate(**inputs, **options)
    stats = handle.stats()

for text in tokenizer.batch_decode(output.sequences[:, prompt_length:], skip_special_tokens=True):
    print("-", " ".join(text.split()))

set_seed(args.seed)
stock = model.generate(**inputs, **options)
stock_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.past_key_values.layers)
print("same tokens as stock:", torch.equal(output.sequences, stock.sequences))
print(f"paged: {stats.peak_bytes / 1024:.0f} KiB of keys and values at most")
print(f"paged: {stats.blocks_shared} blocks of the prompt stand in the tables of all samples")
print(f"stock: {stock_bytes / 1024:.0f} KiB, with {args.samples} copies of the prompt's {prompt_length} tokens")
