"""Patch every generating model that is built in a `with` block, as a user would: when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from transformers import PreTrainedModel

import torch_paged


@contextmanager
def every_model_patched(**knobs: Any) -> Iterator[list[torch_paged.PagedHandle]]:
    """Patch models at the end of `__init__`, or of `from_pretrained` or `from_config` where one of those builds them.

    Copies of a patched model are stock, as they always are.

    Yields: the handles of the patched models, which tell what was paged.
    """
    handles: list[torch_paged.PagedHandle] = []
    loading = 0

    def patch(model: Any) -> None:
        if isinstance(model, PreTrainedModel) and model.can_generate() and not loading:
            handles.append(torch_paged.patch(model, **knobs))

    def after_init(self: PreTrainedModel) -> None:
        post_init(self)
        patch(self)

    def after(stock: Callable[..., Any]) -> Any:
        def load(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            nonlocal loading
            loading += 1
            try:
                result = stock(cls, *args, **kwargs)
            finally:
                loading -= 1
            patch(result[0] if isinstance(result, tuple) else result)
            return result

        return classmethod(load)

    post_init = PreTrainedModel.post_init
    from_pretrained, from_config = PreTrainedModel.from_pretrained.__func__, PreTrainedModel._from_config.__func__
    with (
        mock.patch.object(PreTrainedModel, "post_init", after_init),
        mock.patch.object(PreTrainedModel, "from_pretrained", after(from_pretrained)),
        mock.patch.object(PreTrainedModel, "_from_config", after(from_config)),
    ):
        yield handles
