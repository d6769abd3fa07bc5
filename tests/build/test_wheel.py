"""The wheel: one for every Python, with everything the package reads at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder, "bdist_wheel", "--dist-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_tag_names_no_python(wheel):
    assert "-py3-none-linux_" in wheel.name


def test_holds_what_the_package_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f"torch_paged/{path.name}" for path in (ROOT / "torch_paged").glob("*.so")}
    demo_model = {
        f"torch_paged/cli/demo_model/{path.name}"
        for path in (ROOT / "torch_paged/cli/demo_model").iterdir()
        if path.is_file()
    }
    assert "torch_paged/_C.so" in package and any(name.endswith(".safetensors") for name in demo_model)
    others = {"torch_paged/py.typed", "torch_paged/_build_info.json", "torch_paged/patches/__init__.py"}
    assert package | demo_model | others <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "torch_paged").rglob("*.py")}
    assert modules <= names


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(name).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=2.11\n" in metadata
