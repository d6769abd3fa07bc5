"""LoRA adapters on a patched model: train two, switch between them, disable them; generate stays paged throughout.

    pip install peft
    python examples/lora.py --steps 40 --rank 16 --model FOLDER_OR_HUB_ID

Each adapter learns one sentence by heart.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"
PROMPT = "The whale"
TEXTS = {
    "friendly": "The whale was a kind and gentle creature, and it loved to sing with the children of the village.",
    "hungry": "The whale had eaten nothing since Sunday, and looked upon the bread and the butter with great delight.",
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=20, help="of training, for each adapter")
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--max-new-tokens", type=int, default=20)
args = parser.parse_args()
if min(args.rank, args.steps, args.max_new_tokens) < 1:
    parser.error("--rank, --steps and --max-new-tokens must be at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")

handle = torch_paged.patch(model)
prompt = tokenizer(PROMPT, return_tensors="pt")


def generate(name):
    handle.reset_peak()
    output = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
    text = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    print(f"{name + ':':10} {text} [{handle.stats().peak_bytes / 1024:.0f} KiB paged]")
    return output


base = generate("base")

# The wrapper adapts the patched model in place. For an adapter on disk: PeftModel.from_pretrained(model, folder).
config = LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config, adapter_name="friendly")
model.add_adapter("hungry", config)
for name, text in TEXTS.items():
    model.set_adapter(name)
    batch = tokenizer(text, return_tensors="pt")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    for _ in range(args.steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

outputs = {}
for name in TEXTS:
    model.set_adapter(name)
    outputs[name] = generate(name)
with model.disable_adapter():
    disabled = generate("disabled")
print("disabled, same tokens as before:", torch.equal(disabled, base))

handle.unpatch()
stock = generate("stock")
print("hungry, same tokens as stock:", torch.equal(outputs["hungry"], stock))
