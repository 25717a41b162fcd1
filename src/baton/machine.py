"""Under which conditions a number was measured."""

import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # what reads old records needs the bounds below, and not a second of importing
    import torch

BUSY = 1.5  # times the probe's usual duration, from which what takes seconds counts as slowed by other processes
BUSY_PASS = 3.0  # the same for what takes milliseconds and is repeated: a median forgives more
PATIENCE = 10  # times that a busy machine is looked at again, a second later each


def machine() -> dict[str, Any]:
    """Processor, threads, memory, load, system."""
    import torch

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


def free_bytes(device: "torch.device") -> int:
    """Memory that can still be allocated there."""
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, to be had
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def bandwidth_gb_s(device: "torch.device | str" = "cpu", size_mb: int = 256) -> float:
    """Bytes that all threads together read from the device's memory, GB/s: the floor under a decode step."""
    import torch

    data = torch.ones(size_mb * 2**18, device=device)
    best = min(seconds_of(data.sum) for _ in range(4))
    return round(data.nbytes / best / 1e9, 1)


def probe_s() -> float:
    """Seconds of a fixed piece of work on all threads, about a millisecond.

    On a busy machine it takes many times as long: threads wait for each other at the end of every product.
    """
    import torch

    square = torch.ones(192, 192)
    return min(seconds_of(lambda: [square @ square for _ in range(8)]) for _ in range(2))


class Quiet:
    """Knows how long the probe takes on this machine when nothing else runs, so that what a busy one slowed is told.

    Args:
        known: the probe's durations in earlier runs here, seconds; zeros do not count.
        bound: times the usual duration, from which the machine counts as busy.
    """

    def __init__(self, known: Iterable[float] = (), *, bound: float = BUSY) -> None:
        self.bound = bound
        self.usual = min([seconds for seconds in known if seconds] + [probe_s() for _ in range(10)])
        self.probe = self.usual  # the last duration
        self.in_vain = 0  # waits in a row

    def busy(self) -> bool:
        """Whether other processes are busy now: one look, a few milliseconds."""
        self.probe = probe_s()
        self.usual = min(self.usual, self.probe)
        return self.probe > self.bound * self.usual

    def wait(self) -> float:
        """Wait until the machine is quiet, or for `PATIENCE` seconds, unless that was in vain lately.

        Returns: the probe's last duration.
        """
        patience = PATIENCE if self.in_vain < 2 else 1  # threads of another engine may be what keeps it busy
        for turn in range(patience):
            if not self.busy():
                self.in_vain = 0
                return self.probe
            if turn < patience - 1:
                time.sleep(1)
        self.in_vain += 1
        return self.probe


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
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
