"""The sanitized build: apart from the normal one, and it reports what it is for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import sanitized
from tests.build.test_build import build, fails_with_one_line

pytestmark = pytest.mark.skipif(not sanitized.runtime(), reason="the compiler has no libasan.so: install GCC's")

FAULTS = {
    "reads_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "reads_after_delete": "AddressSanitizer: heap-use-after-free",
    "overflows": "runtime error: signed integer overflow",
    "shifts_too_far": "runtime error: shift exponent 32",
}
# In a file of kernels too, where every instruction set has flags of its own.
SOURCES = {
    "csrc/cpu/ops.cpp": """
#pragma GCC visibility push(default)
extern "C" int nothing_wrong(int n) { int* p = new int[n](); const int last = p[n - 1]; delete[] p; return last; }
extern "C" int reads_past_the_end(int n) { int* p = new int[n](); const int at = p[n]; delete[] p; return at; }
extern "C" int reads_after_delete(int n) { int* p = new int[n](); delete[] p; return p[0]; }
namespace baseline { int overflows(int), shifts_too_far(int); }
extern "C" int overflows(int n) { return baseline::overflows(n); }
extern "C" int shifts_too_far(int n) { return baseline::shifts_too_far(n); }
""",
    "csrc/cpu/isa/kernel.cpp": """
namespace PAGED_ISA {
int overflows(int n) { return 0x7fffffff + n; }
int shifts_too_far(int n) { return 1 << (31 + n); }
}
""",
}


@pytest.fixture
def faulty(checkout):
    for name, text in SOURCES.items():
        (checkout / name).write_text(text)
    return checkout


def call(library, function):
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).{function}(1))"
    torch = Path(importlib.util.find_spec("torch").origin).parent
    environment = sanitized.environment() | {"LD_LIBRARY_PATH": str(torch / "lib")}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_each_fault_is_reported_and_ends_the_process(faulty):
    library = sanitized.build(faulty) / "torch_paged/_C.so"
    assert not (faulty / "build/native").exists() and not list((faulty / "torch_paged").glob("*.so"))
    for function, report in FAULTS.items():
        ran = call(library, function)
        assert ran.returncode != 0 and report in ran.stderr, (function, ran.stderr)
        assert "ops.cpp" in ran.stderr or "kernel.cpp" in ran.stderr, "the report names no source"
    ran = call(library, "nothing_wrong")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0\n", "")


def test_is_not_installed(checkout):
    ran = build(checkout, TORCH_PAGED_SANITIZE="address")
    assert fails_with_one_line(ran), ran.stderr
    assert "TORCH_PAGED_SANITIZE=address: kernels that load nowhere" in ran.stderr


def test_run_refuses_other_kernels():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.build.sanitized"]
    environment = os.environ | {"PYTEST_ADDOPTS": ""}
    ran = subprocess.run(
        [*command, "tests/ops/test_copy_blocks.py"], cwd=sanitized.ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 1 and "/torch_paged/_C.so" in ran.stdout and "not those in " in ran.stdout, ran.stdout
