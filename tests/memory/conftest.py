"""Fixtures of the memory tests."""

from collections.abc import Callable

import pytest

from tests.memory.small_pool import small_pool
from torch_paged.memory import Pool


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    return small_pool
