"""Every test compiles anew, and none finds what another one compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from .lowered import Lowered


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Lowered:
    return Lowered(monkeypatch)
