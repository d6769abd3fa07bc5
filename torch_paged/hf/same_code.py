"""Which methods of transformers' models compute the same: its modelling files repeat each other word by word."""

from __future__ import annotations

import inspect
import sys
from types import FunctionType
from typing import Any


def same_code(method: Any, known: Any) -> bool:
    """Whether two functions are compiled to the same code, whatever they say of it, and call their variables."""
    both = isinstance(method, FunctionType) and isinstance(known, FunctionType)
    return both and _what_runs(method) == _what_runs(known)


def _what_runs(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    kinds = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    # Before Python 3.14, the docstring or None in its place comes first; since then a flag tells.
    has_first = code.co_flags & getattr(inspect, "CO_HAS_DOCSTRING", 0) or sys.version_info < (3, 14)
    constants = code.co_consts[1 if has_first else 0 :]
    return code.co_code, code.co_names, constants, code.co_argcount, code.co_kwonlyargcount, kinds
