"""How much memory a device, or for the CPU this process, has in all and free."""

from pathlib import Path

import torch


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of `device`; of the machine or the container's limit, whichever is less, on the CPU.

    Raises:
        ValueError: the device does not tell.
    """
    try:
        if device.type == "cpu":
            return _host_memory(Path("/"))
        free, total = torch.get_device_module(device).mem_get_info(device)
    except (AttributeError, OSError, RuntimeError) as error:
        raise ValueError(f"max_memory: {device} does not tell its memory; must be bytes on this device") from error
    return int(free), int(total)


def _host_memory(root: Path) -> tuple[int, int]:
    """(free, total) as the files under `root` say."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    free, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    for limit, used in _container_limits(root):
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def _container_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group (version 2) this process is in, cached files not counted as used."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::")):
        top = root / "sys/fs/cgroup"
        for group in [top / path, *(top / path).parents]:
            try:
                limit = (group / "memory.max").read_text().strip()
                used = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                limits.append((int(limit), used - int(stat.get("inactive_file", 0))))
    return limits
