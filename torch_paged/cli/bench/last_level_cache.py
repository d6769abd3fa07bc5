"""How large the last-level cache is: what a measurement of memory must exceed by far."""

import os
from pathlib import Path

ASSUMED_BYTES = 32 << 20
CPUS = Path("/sys/devices/system/cpu")


def last_level_cache_bytes() -> int:
    """Bytes of the last-level caches of all cores together; 32 MiB where the system does not tell."""
    return _from_sysfs(CPUS) or _from_sysconf() or ASSUMED_BYTES


def _from_sysfs(cpus: Path) -> int:
    """The sum over the caches of the highest level: cores of one chip may have several."""
    caches: dict[tuple[int, str], int] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            owners = (index / "shared_cpu_list").read_text().strip()
            caches[level, owners] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    highest = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == highest)


def _from_sysconf() -> int:
    name = "SC_LEVEL3_CACHE_SIZE"
    return max(0, os.sysconf(name)) if name in os.sysconf_names else 0
