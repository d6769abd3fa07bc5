"""MemoryBudget: what max_memory may be, what it comes to, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from torch_paged.memory import MemoryBudget, device_memory, parse_max_memory
from torch_paged.memory.device_memory import _host_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "max_memory, expected",
    [
        (1, 1),
        (123_456, 123_456),
        (np.int64(77), 77),
        ("512", 512),
        ("512B", 512),
        ("2GiB", 2 * 2**30),
        (" 1.5 gib ", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("3k", 3000),
        ("1TiB", 2**40),
    ],
)
def test_sizes_in_bytes(max_memory, expected):
    assert MemoryBudget(max_memory, CPU).max_bytes == expected


@pytest.mark.parametrize(
    "max_memory", [0, -1, 0.0, -0.5, 1.5, float("nan"), "", "GiB", "0", "-2GiB", "2 potatoes", "2GiBB", "1,5GiB"]
)
def test_bad_sizes_are_refused(max_memory):
    with pytest.raises(ValueError, match="max_memory: .*; must be bytes"):
        parse_max_memory(max_memory)


@pytest.mark.parametrize("max_memory", [True, b"2GiB", [1], torch.device("cpu")])
def test_other_types_are_refused(max_memory):
    with pytest.raises(TypeError, match=rf"max_memory: {type(max_memory).__name__}; must be bytes"):
        MemoryBudget(max_memory, CPU)


def test_fraction_is_of_all_memory_and_none_is_half_of_the_free(monkeypatch):
    monkeypatch.setattr("torch_paged.memory.budget.device_memory", lambda device: (600, 1000))
    assert MemoryBudget(0.25, CPU).max_bytes == 250
    assert MemoryBudget(1.0, CPU).max_bytes == 1000
    assert MemoryBudget(None, CPU).max_bytes == 300


def test_free_memory_is_looked_up_at_first_use_and_then_kept(monkeypatch):
    free = [1000]
    monkeypatch.setattr("torch_paged.memory.budget.device_memory", lambda device: (free[0], 2000))
    budget = MemoryBudget(None, CPU)
    free[0] = 500
    assert budget.max_bytes == 250
    free[0] = 10
    assert budget.max_bytes == 250


def test_charges_add_up():
    budget = MemoryBudget(100, CPU)
    budget.charge(70)
    budget.charge(-20)
    assert (budget.used_bytes, budget.free_bytes) == (50, 50)


def test_this_machine_tells_its_memory():
    free, total = device_memory.device_memory(CPU)
    assert 0 < free <= total


def test_a_device_that_does_not_tell_its_memory_is_named():
    with pytest.raises(ValueError, match="max_memory: meta does not tell its memory; must be bytes"):
        MemoryBudget(None, torch.device("meta")).max_bytes  # noqa: B018


def machine(root: Path, groups: dict[str, tuple[str, int, int]], path: str = "/a/b") -> Path:
    """Files of a machine with 100 of 200 KiB free, this process in control group `path`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 200 kB\nMemFree: 10 kB\nMemAvailable: 100 kB\n\n")
    (root / "proc/self/cgroup").write_text(f"1:name=systemd:/\n0::{path}\n")
    for name, (limit, used, cached) in groups.items():
        group = root / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return root


@pytest.mark.parametrize(
    "groups, expected",
    [
        ({}, (100, 200)),
        ({"a/b": ("max", 5000, 0)}, (100, 200)),
        ({"a": (str(80 * 1024), 50 * 1024, 20 * 1024)}, (50, 80)),
        ({"a": (str(80 * 1024), 10 * 1024, 0), "a/b": (str(40 * 1024), 10 * 1024, 0)}, (30, 40)),
        ({"": (str(20 * 1024), 30 * 1024, 0)}, (0, 20)),
        ({"a": (str(900 * 1024), 0, 0)}, (100, 200)),
    ],
    ids=["none", "unlimited", "parent", "tightest", "overdrawn", "above the machine"],
)
def test_a_container_s_limit_counts(tmp_path, groups, expected):
    assert _host_memory(machine(tmp_path, groups)) == tuple(1024 * kib for kib in expected)


def test_no_control_groups_no_limit(tmp_path):
    root = machine(tmp_path, {})
    (root / "proc/self/cgroup").unlink()
    assert _host_memory(root) == (100 * 1024, 200 * 1024)
