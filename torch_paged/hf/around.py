"""What `torch.compile(model)` has put around a call: Python where our tables are edited, compiled inside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
from torch._dynamo.eval_frame import skip_code


def runs_in_python(function: Callable[..., Any]) -> None:
    """Let Dynamo run the frames of `function` as they are and compile those inside, as it does with stock's `__call__`.

    Compiled code that calls it is traced through it all the same, which `torch.compiler.disable` would forbid.
    """
    skip_code(function.__code__)


def compiling_around() -> Any:
    """What compiles frames that run in this thread now, to be called where Dynamo traces nothing; None: nothing."""
    if torch.compiler.is_compiling():
        return None
    callback = get_eval_frame_callback()
    return callback if callable(callback) else None


# Its own frame is one of those.
runs_in_python(compiling_around)


def run_compiled(callback: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` compiled by `callback`, from where compilation is disabled."""
    before = set_eval_frame(callback)
    try:
        return function(*args)
    finally:
        set_eval_frame(before)


def satisfy_fullgraph(callback: Any) -> None:
    """Compile something: `torch.compile(model, fullgraph=True)` raises after a call in which nothing was."""
    run_compiled(callback, _nothing, _NOTHING)


def _nothing(tensor: Tensor) -> Tensor:
    return tensor


_NOTHING = torch.zeros(())
