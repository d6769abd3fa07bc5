"""Versions, instruction sets, GPUs and transformers features: what a bug report needs."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import torch_paged
from torch_paged import ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    environment = collect()
    if args.json:
        print(json.dumps(environment, indent=2))
        return 0
    width = max(map(len, environment)) + 2
    for name, value in environment.items():
        print(f"{name.replace('_', ' '):<{width}}{_as_text(value)}")
    return 0


def collect() -> dict[str, Any]:
    """Return what this machine and this installation consist of, as JSON can hold it."""
    built = _build_info()
    return {
        "torch_paged": torch_paged.__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_instruction_sets": built["cpu_instruction_sets"],
        "cpu_instruction_set": ops.cpu_instruction_set(),
        "cuda_architectures": built["cuda_architectures"],
        "compiler": built["compiler"],
        "nvcc": built["nvcc"],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "transformers_features": _transformers_features(),
    }


def _build_info() -> dict[str, Any]:
    path = Path(torch_paged.__file__).parent / "_build_info.json"
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _transformers_features() -> dict[str, bool] | None:
    try:
        from torch_paged.hf.features import probe
    except ImportError:
        return None
    return probe()


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)
