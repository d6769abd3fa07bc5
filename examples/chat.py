"""A chat in which each turn computes its new tokens alone: the cache that generate returned holds the turns before.

    python examples/chat.py --model FOLDER_OR_HUB_ID

Type a line and read the answer as it is generated; an empty line ends. The small model of the demo knows no turns:
it goes on with the text you type. A model with a chat template is asked through it.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import torch_paged

DEMO_MODEL = Path(torch_paged.__file__).parent / "cli" / "demo_model"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", default=DEMO_MODEL, help="default: the demo's small model")
parser.add_argument("--max-new-tokens", type=int, default=60)
args = parser.parse_args()
if args.max_new_tokens < 1:
    parser.error("--max-new-tokens must be at least 1")
try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
except (OSError, ValueError) as error:
    parser.error(f"--model {args.model}: no causal language model there: {' '.join(str(error).split())}")

handle = torch_paged.patch(model)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
# How many tokens each forward pass computes; the first pass of a turn is its prefill.
computed = []
model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape[1]))


def typed_lines():
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            yield line


messages, text, cache = [], torch.empty(1, 0, dtype=torch.long), None
for line in typed_lines():
    messages.append({"role": "user", "content": line})
    before = text
    if tokenizer.chat_template:
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        text = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    else:
        new = tokenizer(" " + line, add_special_tokens=cache is None, return_tensors="pt")
        text = torch.cat([before, new["input_ids"]], dim=1)
    cached = 0 if cache is None else cache.get_seq_length()
    if not torch.equal(text[:, :cached], before[:, :cached]):
        cache = None  # the template has rewritten earlier turns

    computed.clear()
    output = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        past_key_values=cache,
        streamer=streamer,
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
    )
    stats = handle.stats()
    print(f"[prefilled {computed[0]} of {text.shape[1]} tokens; the chat holds {stats.blocks_used} blocks]")
    answer = tokenizer.decode(output.sequences[0, text.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
    text, cache = output.sequences, output.past_key_values
