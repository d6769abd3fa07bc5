"""What an access costs, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.traffic import _sectors, _wavefronts

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        pytest.param(LANES * 4, 4, (4, 4), id="neighbouring words"),
        pytest.param(LANES * 4 + 16, 4, (5, 4), id="off by half a sector"),
        pytest.param(LANES * 32, 4, (32, 4), id="a sector each"),
        pytest.param(LANES * 16, 16, (16, 16), id="pieces of 16 bytes"),
        pytest.param(LANES // 8 * 4096 + LANES % 8 * 16, 16, (16, 16), id="rows of 128 bytes, far apart"),
        pytest.param(LANES * 4096, 16, (32, 16), id="16 bytes each, far apart"),
        pytest.param(LANES * 0, 4, (1, 1), id="one word for all"),
    ],
)
def test_sectors(address, size, expected):
    assert _sectors(LANES, address, size) == expected


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        pytest.param(LANES * 4, 4, (1, 1), id="neighbouring words"),
        pytest.param(LANES * 8, 4, (2, 1), id="every second word"),
        pytest.param(LANES * 128, 4, (32, 1), id="all in one bank"),
        pytest.param(LANES * 0, 4, (1, 1), id="one word for all"),
        pytest.param(LANES * 8, 8, (2, 2), id="pairs of words"),
        pytest.param(LANES * 16, 16, (4, 4), id="pieces of 16 bytes"),
        pytest.param(LANES * 128, 16, (32, 4), id="rows of 128 bytes: eight lanes on four banks"),
        pytest.param(LANES * 144, 16, (4, 4), id="rows of 144 bytes: a padding of 16"),
        pytest.param(LANES * 128 + ((LANES % 8) * 16), 16, (4, 4), id="rows of 128 bytes, swizzled"),
        pytest.param(LANES * 2, 2, (1, 1), id="neighbouring halves of words"),
    ],
)
def test_wavefronts(address, size, expected):
    assert _wavefronts(LANES, address, size) == expected


def test_warps_do_not_share():
    threads = np.arange(64)
    assert _sectors(threads, threads % 32 * 4, 4) == (8, 8)
    assert _wavefronts(threads, threads % 32 * 4, 4) == (2, 2)
