"""The `paged` op library: its namespace, its compiled kernels, and the errors its wrappers raise."""

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

library = torch.library.Library("paged", "DEF")  # type: ignore[no-untyped-call]

_CHECK_TEXT = re.compile(r"\w+(\[\d+\])?: .+; must be .+")
_Function = TypeVar("_Function", bound=Callable[..., object])


def define(schema: str, *tags: torch.Tag) -> None:
    """Define an op, whose implementation is C++, by its schema."""
    # Inductor must hand over the strides as they are: a restrided cache would be a copied cache.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, *tags)
    library.define(schema, tags=tags)  # type: ignore[no-untyped-call]


def fake(op: str) -> Callable[[_Function], _Function]:
    """Register the decorated function as what the compiler runs to learn the shapes of an op's results."""
    register: Callable[[_Function], _Function] = torch.library.register_fake(f"paged::{op}", lib=library)
    return register


class value_errors:
    """Raise the RuntimeError of an argument check as a ValueError with the same text; let any other error through.

    A class, because TorchDynamo traces its two methods but not a generator's `except`.
    """

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and is_refusal(error):
            raise ValueError(str(error)) from None


def is_refusal(error: BaseException) -> bool:
    """Whether this is an op's argument check, not something that went wrong while it ran."""
    return type(error) is RuntimeError and _CHECK_TEXT.fullmatch(str(error)) is not None


def check_same_device(like: Tensor, **arguments: Tensor | None) -> None:
    """Refuse tensors on several devices.

    PyTorch calls the fake kernel for real tensors too when one of them is on the meta device.

    Raises:
        RuntimeError: one of `arguments` is not where `like` is; the text names it.
    """
    for name, tensor in arguments.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{name}: on {tensor.device}; must be on {like.device}, like the other tensors")


def load_kernels() -> None:
    """Load `_C.so` and, where it was built, `_cuda.so`.

    Raises:
        ImportError: `_C.so` is missing or does not load.
    """
    package = Path(__file__).resolve().parent.parent
    if not (package / "_C.so").exists():
        raise ImportError(
            f"torch_paged was imported from {package}, which has no compiled kernels (_C.so); "
            "build them with `pip install -e .` in the repository, or run Python from another directory"
        )
    for path in (package / "_C.so", package / "_cuda.so"):
        if path.exists():
            try:
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            except OSError as error:
                raise ImportError(
                    f"{path} does not load into torch {torch.__version__} ({error}); "
                    "torch 2.11 or newer is needed, or a rebuild with `pip install -e .`"
                ) from error
