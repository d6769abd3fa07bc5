"""Which methods of transformers' models compute the same: its modelling files repeat each other word by word."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any


def same_code(method: Any, known: Any) -> bool:
    """Whether two functions are compiled to the same code, whatever they say of it, and call their variables."""
    both = isinstance(method, FunctionType) and isinstance(known, FunctionType)
    return both and _what_runs(method) == _what_runs(known)


def _what_runs(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    kinds = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    # The docstring, or None in its place.
    constants = code.co_consts[code.co_consts[:1] == (function.__doc__,) :]
    return code.co_code, code.co_names, constants, code.co_argcount, code.co_kwonlyargcount, kinds
