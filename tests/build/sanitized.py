"""Runs the tests of the ops on kernels compiled with GCC's address and undefined behaviour sanitizers.

`python -m tests.build.sanitized [options of pytest]`, in an environment that has torch_paged's `dev` extra installed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = "address,undefined"
# test_reservation calls the ops that give memory back to the system.
TESTS = ["tests/ops", "tests/memory/test_reservation.py", "tests/memory/test_pool.py"]


def build(root: Path) -> Path:
    """Copy the package of this checkout, with sanitized kernels, into a folder of its own; return the folder.

    Raises:
        SystemExit: the compiler failed.
    """
    folder = root / "build" / "sanitized" / "package"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder.parent, "--build-lib", folder]
    if subprocess.call(command, cwd=root, env=os.environ | {"TORCH_PAGED_SANITIZE": SANITIZERS}):
        raise SystemExit(1)
    return folder


def runtime() -> list[str]:
    """Return the libraries that a process has to load before any other, or nothing where the compiler has none."""
    # Without libstdc++, which Python itself does not load, libasan finds no `throw` to follow.
    names = ["libasan.so", "libubsan.so", "libstdc++.so"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    paths = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return paths if all(map(os.path.isabs, paths)) else []


def environment() -> dict[str, str]:
    """Return the variables under which Python loads sanitized kernels, and ends at their first finding."""
    return os.environ | {
        "LD_PRELOAD": " ".join(runtime()),
        # Python and torch leave memory to the end of the process on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def pytest_collection_finish(session: pytest.Session) -> None:
    """As a plugin of the run: nothing is proven by kernels from elsewhere."""
    import torch

    package = ROOT / "build" / "sanitized" / "package"
    others = [path for path in torch.ops.loaded_libraries if not Path(path).is_relative_to(package)]
    if others or not torch.ops.loaded_libraries:
        pytest.exit(f"the tests loaded {others or 'no kernels'}, not those in {package}", returncode=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The CUDA kernels have no sanitized build; `tests/emulator` checks their accesses."""
    items[:] = [item for item in items if "[cuda" not in item.nodeid]


def main(arguments: list[str]) -> int:
    if not runtime():
        raise SystemExit("tests.build.sanitized: the compiler has no libasan.so and libubsan.so; install GCC's")
    package = build(ROOT)
    # By PYTEST_ADDOPTS, so that the pytest that a test starts runs on these kernels too. A finding is written to the
    # process's own stderr as it ends: it would be lost with what pytest captures there.
    options = f"-p tests.build.sanitized -o pythonpath='{package} {ROOT}' --capture=sys"
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, *arguments]
    return subprocess.call(command, cwd=ROOT, env=environment() | {"PYTEST_ADDOPTS": options})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
