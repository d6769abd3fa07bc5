"""Patch a model, and call generate as before.

    python examples/generate.py [model] [prompt]

`model` is a folder or a hub id of a causal language model; without one, the small model of the demo is used.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"

name = sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL)
prompt = sys.argv[2] if len(sys.argv) > 2 else "It is a truth universally acknowledged, that"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
inputs = tokenizer(prompt, return_tensors="pt")

# The line that changes: from here on, generate keeps its keys and values in blocks of a pool.
handle = torch_paged.patch(model)

output = model.generate(**inputs, max_new_tokens=40, num_beams=4, num_return_sequences=4)
for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print("-", " ".join(text.split()))

stats = handle.stats()
print(f"at most {stats.peak_bytes / 1024:.0f} KiB of keys and values, {stats.peak_blocks_shared} blocks shared")

# And back: the model is exactly as it was.
handle.unpatch()
stock = model.generate(**inputs, max_new_tokens=40, num_beams=4, num_return_sequences=4)
print("same tokens as stock:", torch.equal(output, stock))
