"""Which methods of transformers' models compute the same: its modelling files repeat each other word by word."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any


def same_code(method: Callable[..., Any], known: Callable[..., Any]) -> bool:
    """Whether two functions are compiled to the same code, whatever their local variables are called."""
    code, expected = getattr(method, "__code__", None), getattr(known, "__code__", None)
    return isinstance(code, CodeType) and isinstance(expected, CodeType) and _what_runs(code) == _what_runs(expected)


def _what_runs(code: CodeType) -> tuple[Any, ...]:
    kinds = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_code, code.co_names, code.co_consts, code.co_argcount, code.co_kwonlyargcount, kinds
