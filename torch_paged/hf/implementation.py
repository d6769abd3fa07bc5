"""The attention implementation's name while a model is patched, which remembers the name that stood there before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, SupportsIndex

from torch import nn

NAME = "torch_paged"


class PagedImplementation(str):
    """The string "torch_paged" that knows which implementation it stands in for.

    It lives in `config._attn_implementation_internal`, so whoever holds the config (the attention modules, the mask
    functions, another model that shares the config object) finds the implementation to delegate to. Copying and
    pickling give back the plain name of that implementation: a copy of a patched model is a stock model.

    It equals that name too, for all code that compares: `config.output_attentions = True` asks for "eager", models
    branch on "sdpa". What looks a name up, in the registries of attention and mask functions, goes by the hash and
    finds "torch_paged".
    """

    previous: str
    models: int

    def __new__(cls, previous: str) -> PagedImplementation:
        name = super().__new__(cls, NAME)
        name.previous = previous
        name.models = 1
        return name

    def __eq__(self, other: object) -> bool:
        # Dynamo does not trace `str.__eq__(self, other)` either.
        return other in (NAME, self.previous)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        # In Python: Dynamo does not trace the slot of a subclass of str.
        return str.__hash__(NAME)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[str], tuple[str]]:
        return str, (self.previous,)

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.previous


def install(model: nn.Module) -> list[Any]:
    """Put `PagedImplementation` into every config of `model`; a config shared with a patched model counts both.

    Returns: those configs.
    """
    configs = list(_configs(model))
    for config in configs:
        current = config._attn_implementation_internal
        if isinstance(current, PagedImplementation):
            current.models += 1
        else:
            config._attn_implementation_internal = PagedImplementation(current)
    return configs


def uninstall(configs: list[Any]) -> None:
    """Undo the `install` that returned `configs`. An implementation that the user has set meanwhile stays."""
    for config in configs:
        current = config._attn_implementation_internal
        if isinstance(current, PagedImplementation):
            current.models -= 1
            if current.models == 0:
                config._attn_implementation_internal = current.previous


def previous(config: Any) -> str:
    """The implementation that `config` names without the patch.

    Raises:
        ValueError: someone else wrote our name there.
    """
    name: str = config._attn_implementation
    if isinstance(name, PagedImplementation):
        return name.previous
    if name == NAME:
        raise ValueError(f"attn_implementation: {NAME!r}; must be set by torch_paged.patch(model), not by name")
    return name


def register_in(classes: dict[str, Any]) -> None:
    """Add our name to a model's own table of attention classes, for models that are built from a patched one's config.

    Args:
        classes: the classes by the name of the implementation; they get the config as their first argument.
    """
    classes[NAME] = lambda config, *args, **kwargs: classes[previous(config)](config, *args, **kwargs)


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in seen:
            seen.add(id(config))
            yield config
