"""The stand-in for the driver's virtual memory: it notes what is done wrong."""

import ctypes
from collections.abc import Iterator

import pytest

from tests.emulator.device_memory import DeviceMemory
from tests.emulator.library import NO_NVCC, emulated_ops, has_nvcc

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)
PAGE = 4096
INVALID, OUT_OF_MEMORY = 1, 2


class Properties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of device 0."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", ctypes.c_int),
        ("rest", ctypes.c_int * 9),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc: device 0 may read and write."""

    _fields_ = (("location", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int))


KIND, ACCESS = Properties(1, 0, 1), Access(1, 0, 3)


def number(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


class Pages:
    """Two pages of address space, the first of them mapped."""

    def __init__(self, driver: DeviceMemory) -> None:
        self.driver, base = driver, ctypes.c_uint64()
        driver.call("cuMemAddressReserve", ctypes.byref(base), number(2 * PAGE), number(0), number(0), number(0))
        self.base = base.value
        self.memory = self.create()
        assert self.map(0) == self.grant() == 0

    def create(self) -> int:
        memory = ctypes.c_uint64()
        error = self.driver.call("cuMemCreate", ctypes.byref(memory), number(PAGE), ctypes.byref(KIND), number(0))
        return -error if error else memory.value

    def map(self, page: int) -> int:
        at = number(self.base + page * PAGE)
        return self.driver.call("cuMemMap", at, number(PAGE), number(0), number(self.memory), number(0))

    def grant(self, pages: int = 1) -> int:
        return self.driver.call(
            "cuMemSetAccess", number(self.base), number(pages * PAGE), ctypes.byref(ACCESS), number(1)
        )

    def unmap(self, bytes: int = PAGE) -> int:
        return self.driver.call("cuMemUnmap", number(self.base), number(bytes))

    def release(self) -> int:
        return self.driver.call("cuMemRelease", number(self.memory))

    def free(self) -> int:
        return self.driver.call("cuMemAddressFree", number(self.base), number(2 * PAGE))


@pytest.fixture
def pages() -> Iterator[Pages]:
    with emulated_ops().device_memory.device(PAGE) as driver:
        made = Pages(driver)
        yield made
        driver.wait()
        assert made.unmap() == made.release() == made.free() == 0


def test_right_use_is_no_misuse(pages):
    assert pages.driver.held == (2 * PAGE, PAGE, PAGE)
    ctypes.memset(pages.base, 1, PAGE)
    pages.driver.launch()  # work that began before the second page was mapped does not use it
    assert pages.map(1) == pages.grant(2) == 0
    assert pages.driver.call("cuMemUnmap", number(pages.base + PAGE), number(PAGE)) == 0
    assert pages.driver.misuse == ""
    assert pages.driver.mapped(pages.base, 2 * PAGE) == [(pages.base, pages.base + PAGE)]


def test_memory_that_is_not_there_cannot_be_had(pages):
    pages.driver.set(PAGE, memory=PAGE - 1)
    assert pages.create() == -OUT_OF_MEMORY
    assert pages.driver.misuse == ""


@pytest.mark.parametrize(
    "misuse, text",
    [
        (lambda pages: pages.map(0), "cuMemMap: memory is mapped there already"),
        (lambda pages: pages.map(2), "cuMemMap: not whole pages of a reservation"),
        (lambda pages: pages.grant(2), "cuMemSetAccess: no memory is mapped there"),
        (lambda pages: pages.unmap(2 * PAGE), "cuMemUnmap: not the whole of a mapping"),
        (lambda pages: (pages.driver.launch(), pages.unmap())[1], "cuMemUnmap: work that may use it has not finished"),
        (lambda pages: pages.free(), "cuMemAddressFree: memory is mapped in it"),
    ],
)
def test_misuse_is_noted(pages, misuse, text):
    assert misuse(pages) == INVALID
    assert pages.driver.misuse == text
