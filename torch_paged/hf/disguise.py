"""Give a subclass the face of its base, for objects whose class is replaced while a model is patched."""

from __future__ import annotations

from typing import Any, SupportsIndex


def disguise(cls: type[Any], base: type[Any]) -> None:
    """Let `cls` show the name of `base`; copies and pickles of its instances, and new ones, are of class `base`."""

    def __new__(maker: type[Any], *args: Any, **kwargs: Any) -> Any:
        if maker is not cls:
            return object.__new__(maker)
        # torch makes the replicas of nn.DataParallel so, and fills in the attributes itself.
        return base(*args, **kwargs) if args or kwargs else object.__new__(base)

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:
        reduce: Any = base.__reduce_ex__
        _, _, *state = reduce(self, protocol)
        return (object.__new__, (base,), *state)

    cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
    cls.__doc__ = base.__doc__
    cls.__new__ = staticmethod(__new__)  # type: ignore[assignment]
    setattr(cls, "__reduce_ex__", __reduce_ex__)  # noqa: B010  mypy: a method's type
    cls._torch_paged_stock_class = base


def undisguise(model: Any) -> None:
    """Give `model` its stock class back, also under a class that someone derived from the disguised one meanwhile."""
    cls: Any = type(model)
    if stock_class(cls) is not cls:
        model.__class__ = stock_class(cls)
        return
    bases = tuple(stock_class(base) for base in cls.__bases__)
    if bases != cls.__bases__:
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        make: Any = type(cls)
        model.__class__ = make(cls.__name__, bases, own)


def stock_class(cls: type[Any]) -> type[Any]:
    """The base that `cls` is a disguised subclass of; `cls` itself if it is none."""
    base: type[Any] = cls.__dict__.get("_torch_paged_stock_class", cls)
    return base
