"""Fetch transformers' own tests: the sdist of the version that `dev` pins, unpacked into .ci, which git ignores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
VARIABLE = "TORCH_PAGED_TRANSFORMERS"
COMMAND = "python -m tests.outside.fetch"
VERSION_FILE = "src/transformers/__init__.py"


def pinned_version() -> str:
    (version,) = re.findall(r'"transformers==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    return str(version)


def source() -> Path:
    """The sdist or checkout to take the tests from: the one that the environment names, else the one in .ci."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else ROOT / ".ci" / f"transformers-{pinned_version()}"


def version_of(folder: Path) -> str:
    """Raises: FileNotFoundError, ValueError: the folder holds no transformers."""
    (version,) = re.findall(r'^__version__ = "([^"]+)"', (folder / VERSION_FILE).read_text(), re.MULTILINE)
    return str(version)


def is_checkout(folder: Path) -> bool:
    """Whether the folders of the tests are there too, which the sdist leaves out."""
    return (folder / "tests" / "generation" / "test_utils.py").exists()


def obstacle(installed: str) -> str | None:
    """Why the tests cannot run against the installed transformers, and what to do about it; None if they can."""
    folder = source()
    if not (folder / "tests" / "test_modeling_common.py").exists():
        if os.environ.get(VARIABLE):
            return f"{VARIABLE}={folder} has no tests/test_modeling_common.py: name an sdist or a checkout"
        return f"transformers' tests are not here: {COMMAND}"
    if (version := version_of(folder)) != installed:
        return f"transformers {installed} is installed, the tests are those of {version}: pip install -e '.[dev]'"
    return None


def unpack(archive: Path, folder: Path) -> None:
    """The tests of the sdist and the file that tells its version."""
    with tarfile.open(archive) as sdist:
        for member in sdist:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not member.isfile() or ".." in path.parts:
                continue
            if path.parts[:1] == ("tests",) or str(path) == VERSION_FILE:
                content = sdist.extractfile(member)
                assert content is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content.read())


def fetch() -> Path:
    """The folder with the tests, downloaded unless it is there."""
    folder = source()
    if os.environ.get(VARIABLE) or folder.exists():
        return folder
    requirement = f"transformers=={pinned_version()}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        options = ["--no-deps", "--no-binary", "transformers", "--dest", download]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, requirement], check=True)
        (archive,) = Path(download).glob("transformers-*.tar.gz")
        unpack(archive, Path(download) / "unpacked")
        # Renamed as a whole, so that a fetch that was cut off leaves nothing behind.
        (Path(download) / "unpacked").rename(folder)
    return folder


if __name__ == "__main__":
    print(fetch())
