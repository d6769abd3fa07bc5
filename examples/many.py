"""Many prompts through one model: new ones begin as soon as others are done, each with settings of its own.

python examples/many.py --model FOLDER_OR_HUB_ID --requests 24 --at-once 8
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
BEGINNINGS = ["Once upon a time", "The king said", "In the morning", "She looked at the sea and", "My dear friend,"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--requests", type=int, default=12)
parser.add_argument("--at-once", type=int, default=4, help="sequences that run at the same time")
args = parser.parse_args()
if args.requests < 1 or args.at_once < 1:
    parser.error("--requests and --at-once must be at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")


def requests():
    """Made one by one, as there is room for them: this could read a file or a queue."""
    for number in range(args.requests):
        prompt = tokenizer(BEGINNINGS[number % len(BEGINNINGS)]).input_ids
        settings = {"max_new_tokens": 10 + 5 * (number % 4), "do_sample": number % 2 == 1}
        yield torch_paged.GenerationRequest(prompt, options=settings, seed=number)


with torch_paged.paged(model) as handle:
    many = torch_paged.generate_many(model, requests(), max_num_seqs=args.at_once, repetition_penalty=1.3)
    for result in many:
        text = tokenizer.decode(result.sequences[0], skip_special_tokens=True)
        print(f"{result.request_id}: {result.finish_reason}: {' '.join(text.split())}")
    stats = many.stats()
    print(f"{stats.finished} finished, {stats.new_tokens} tokens in {stats.forwards} forward passes")
    print(f"{stats.tokens_per_second:,.0f} tokens/s, first token after {stats.time_to_first_token.p50 * 1000:.0f} ms")
    print(f"{handle.stats().blocks_used} blocks are still held")
