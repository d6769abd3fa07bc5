"""Train on the model's own samples (REINFORCE): paged while it samples, stock's forward and backward in between.

    python examples/rollouts.py --steps 20 --samples 32 --model FOLDER_OR_HUB_ID

The toy reward is the share of the letter "e" in a sample. It rises.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--prompt", default="In the beginning God created the heaven and the earth. And the earth was")
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--max-new-tokens", type=int, default=24)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()
if not args.prompt or args.samples < 2 or args.steps < 1 or args.max_new_tokens < 1:
    parser.error("--prompt must not be empty, --samples must be at least 2, --steps and --max-new-tokens at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

inputs = tokenizer(args.prompt, return_tensors="pt")
prompt_length = inputs["input_ids"].shape[1]
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
handle = torch_paged.patch(model)  # once: training steps never notice


def rollout():
    return model.generate(
        **inputs, do_sample=True, top_k=0, num_return_sequences=args.samples, max_new_tokens=args.max_new_tokens
    )


def reward(text):
    return text.count("e") / max(1, len(text))


set_seed(0)
for step in range(args.steps):
    handle.reset_peak()
    sequences = rollout()
    new = sequences[:, prompt_length:]
    rewards = torch.tensor([reward(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)])
    memory = handle.stats()  # nothing holds a cache any more: backward has the memory to itself

    logits = model(sequences, use_cache=False).logits[:, prompt_length - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, new[:, :, None]).squeeze(-1)
    is_end = (new == tokenizer.eos_token_id).long()
    ended = is_end.cumsum(1) > is_end  # padding
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    loss = -(advantages[:, None] * log_probs.masked_fill(ended, 0)).sum() / (~ended).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step}: reward {rewards.mean():.3f}, "
        f"{memory.peak_bytes / 1024:.0f} KiB of KV while sampling, {memory.bytes_held / 1024:.0f} before backward"
    )

set_seed(1)
paged = rollout()
handle.unpatch()
set_seed(1)
print("same samples of the trained model as stock:", torch.equal(paged, rollout()))
