"""Everything of a model that a patch could leave behind, in a form that compares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig


def host_state(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes, hooks and configs of a model and all of its submodules.

    Attributes compare by identity: a `forward` that was wrapped and unwrapped is not the one that was there.
    """
    state: dict[str, Any] = {}
    configs: dict[int, PreTrainedConfig] = {}
    for name, module in model.named_modules():
        state[name] = type(module), {key: _identity(value) for key, value in module.__dict__.items()}
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            _collect(config, configs)
    state["configs"] = {number: _config_state(config) for number, config in configs.items()}
    state["class"] = {key: _identity(value) for key, value in vars(type(model)).items()}
    return state


def _collect(config: PreTrainedConfig, found: dict[int, PreTrainedConfig]) -> None:
    if id(config) not in found:
        found[id(config)] = config
        for value in vars(config).values():
            if isinstance(value, PreTrainedConfig):
                _collect(value, found)


def _config_state(config: PreTrainedConfig) -> tuple[Any, ...]:
    values = {key: value for key, value in vars(config).items() if not isinstance(value, PreTrainedConfig)}
    kinds = {key: type(value) for key, value in values.items()}
    return type(config), values, kinds, config.to_dict(), type(config._attn_implementation)


def _identity(value: Any) -> Any:
    """Registries of hooks and children by what is in them, other values by what they are."""
    if isinstance(value, dict):
        return {key: _identity(item) if not isinstance(item, dict) else id(item) for key, item in value.items()}
    if isinstance(value, Tensor) and value.device.type == "meta":
        # Offloaded weights stand here for the length of a call; accelerate puts a new one in their place after it.
        return "meta"
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)
