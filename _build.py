"""The PEP 517 build backend: setuptools, which asks for torch only where the target environment has no fitting one."""

import re
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a backend re-exports every hook it does not change

OLDEST_TORCH = (2, 11)
TESTED_TORCH = "torch==2.13.0"


def find_torch() -> Path | None:
    """Return the first torch whose headers fit, of this interpreter or of the environment it installs into."""
    for entry in [*sys.path, sysconfig.get_path("purelib")]:
        torch = Path(entry) / "torch"
        if (torch / "include/torch/csrc/stable/library.h").exists() and _version(torch) >= OLDEST_TORCH:
            return torch.resolve()
    return None


def torch_if_missing() -> list[str]:
    """Return the requirement that the build environment still has."""
    return [] if find_torch() else [TESTED_TORCH]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_if_missing()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + torch_if_missing()


def _version(torch: Path) -> tuple[int, int]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return (int(found[1]), int(found[2])) if found else (0, 0)
