"""Give a subclass the face of its base, for objects whose class is replaced while a model is patched."""

from __future__ import annotations

from typing import Any, SupportsIndex


def disguise(cls: type[Any], base: type[Any]) -> None:
    """Let `cls` show the name of `base`; copies and pickles of its instances, and new ones, are of class `base`."""

    def __new__(maker: type[Any], *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs) if maker is cls else object.__new__(maker)

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:
        reduce: Any = base.__reduce_ex__
        _, _, *state = reduce(self, protocol)
        return (object.__new__, (base,), *state)

    cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
    cls.__doc__ = base.__doc__
    cls.__new__ = staticmethod(__new__)  # type: ignore[assignment]
    setattr(cls, "__reduce_ex__", __reduce_ex__)  # noqa: B010  mypy: a method's type
    cls._torch_paged_stock_class = base


def stock_class(cls: type[Any]) -> type[Any]:
    """The base that `cls` is a disguised subclass of; `cls` itself if it is none."""
    base: type[Any] = cls.__dict__.get("_torch_paged_stock_class", cls)
    return base
