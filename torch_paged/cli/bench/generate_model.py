"""The model of `bench generate`: one of a given shape with random weights, or one that the user names."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_paged.cli.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model: speed and memory depend on the shape alone, so that random weights will do."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def name(self) -> str:
        return (
            f"random {self.layers}x{self.hidden}, {self.heads}/{self.kv_heads} heads, "
            f"inter {self.intermediate}, vocabulary {self.vocabulary}"
        )


def random_model(shape: Shape, positions: int, dtype: torch.dtype, seed: int) -> "PreTrainedModel":
    """A model with `positions` positions and seeded weights.

    Raises:
        CommandError: transformers is missing, or the numbers do not fit one another.
    """
    try:
        from transformers import AutoModelForCausalLM, Qwen2Config
    except ImportError:
        raise CommandError("transformers is not installed; run `pip install transformers`") from None
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.hidden // shape.heads % 2:
        raise CommandError(
            f"--hidden {shape.hidden} --heads {shape.heads} --kv-heads {shape.kv_heads}; must be an even multiple of "
            "the heads, and these a multiple of the kv heads"
        )
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        use_sliding_window=False,
    )
    torch.manual_seed(seed)
    return prepared(AutoModelForCausalLM.from_config(config, dtype=dtype), positions)


def named_model(name: str, positions: int, dtype: torch.dtype) -> "PreTrainedModel":
    """A causal language model from a folder or the hub.

    Raises:
        CommandError: transformers is missing, there is no such model, or it has too few positions.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise CommandError("transformers is not installed; run `pip install transformers`") from None
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CommandError(f"--model {name}: no such folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        # A folder can be broken in as many ways as there are libraries that read it.
        raise CommandError(f"--model {name}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return prepared(model, positions)


def with_same_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Another model, to be patched by itself, over the same parameters and buffers."""
    weights: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def prepared(model: "PreTrainedModel", positions: int) -> "PreTrainedModel":
    """The model in evaluation, without tokens that end a sequence: every way generates the same number of tokens.

    Raises:
        CommandError: it has fewer than `positions` positions.
    """
    from transformers import GenerationConfig

    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < positions:
        raise CommandError(f"prompts and new tokens take {positions} positions; must be at most the model's {longest}")
    model.config.eos_token_id = config.eos_token_id = None
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval()
