"""Import transformers' tests as a package of another name, and collect the test cases of a family.

Its package is called `tests`, as ours is. Modules in it import one another relatively, so any name will do.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import random
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import fetch

PACKAGE = "transformers_own_tests"


def load(folder: Path) -> None:
    """Make the tests in `folder` importable as PACKAGE, with stand-ins for what the sdist leaves out."""
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder / "tests")]
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    if not fetch.is_checkout(folder):
        _stand_in("exporters", "test_export", "ExportTesterMixin")
        _stand_in("generation", "test_utils", "GenerationTesterMixin")


def module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def cases(name: str) -> list[type[unittest.TestCase]]:
    """The test cases of a module of the checkout that build their models themselves, instead of loading them."""
    found = module(name)
    mixins = (module("test_modeling_common").ModelTesterMixin, module("generation.test_utils").GenerationTesterMixin)
    return [
        case
        for case in vars(found).values()
        if isinstance(case, type)
        and issubclass(case, unittest.TestCase)
        and case.__module__ == found.__name__
        and (issubclass(case, mixins) or name == "generation.test_utils")
    ]


def seed() -> None:
    """The same random numbers for the stock and the patched run, transformers' own generator included."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module("test_modeling_common").global_rng.seed(0)


def _stand_in(package: str, name: str, mixin: str) -> None:
    """An empty mixin: it takes part in inheritance and brings no tests."""
    folder = types.ModuleType(f"{PACKAGE}.{package}")
    folder.__path__ = []
    sys.modules[folder.__name__] = folder
    stand_in = types.ModuleType(f"{PACKAGE}.{package}.{name}")
    setattr(stand_in, mixin, type(mixin, (), {}))
    sys.modules[stand_in.__name__] = stand_in
