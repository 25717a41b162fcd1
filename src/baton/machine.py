"""Under which conditions a number was measured."""

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def machine() -> dict[str, Any]:
    """Processor, threads, memory, load, system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": name,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(psutil.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each."""
    return {name: version(name) for name in packages}


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated there."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, to be had
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def bandwidth_gb_s(size_mb: int = 256) -> float:
    """Bytes that all threads together read from the CPU's memory, GB/s: the floor under a decode step."""
    data = torch.ones(size_mb * 2**18)
    best = min(seconds_of(data.sum) for _ in range(4))
    return round(data.nbytes / best / 1e9, 1)


def probe_s() -> float:
    """Seconds of a fixed piece of work on all threads, about a millisecond.

    On a busy machine it takes many times as long: threads wait for each other at the end of every product.
    """
    square = torch.ones(192, 192)
    return min(seconds_of(lambda: [square @ square for _ in range(8)]) for _ in range(2))


def revision(folder: Path = Path(__file__).parent) -> str | None:
    """The git commit of the code that runs, `-dirty` behind it where it was changed; None outside of a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a piece of work takes, on a GPU until it is done there."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
