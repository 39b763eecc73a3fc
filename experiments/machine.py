"""The machine that a run uses: its device, its memory, and the versions of what is installed."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from threadpoolctl import threadpool_limits

from jlcm.config import Invalid, check_choice

#: glibc's names of its options (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(device: str) -> torch.device:
    """Resolve auto, and refuse a GPU that is not there.

    Raises:
        Invalid: for an unknown device, or a CUDA device that PyTorch does not see.
    """
    check_choice("compute.device", device.partition(":")[0], ("auto", "cpu", "cuda"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Invalid(f"compute.device={device}, but PyTorch sees no GPU: use compute.device=auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def limit_threads(count: int | None) -> None:
    """Let PyTorch and the thread pools of clustering use so many threads; None: as they are."""
    if count is not None:
        torch.set_num_threads(count)
        threadpool_limits(count)


def versions(*more: str) -> dict[str, str]:
    """Versions of what a result depends on, and of further packages."""
    packages = ("jlcm", "torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in (*packages, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def keep_freed_blocks() -> None:
    """Let glibc reuse freed blocks of up to 64 MB, and keep up to 512 MB of them.

    By default each tensor of some megabytes is mapped, zeroed page by page and unmapped again,
    which can take longer than what is computed with it: elementwise operations on 10 MB tensors
    take about half as long this way. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def reset_peak_rss() -> None:
    """Measure `peak_rss_bytes` from here on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Largest resident set size of this process since `reset_peak_rss`, or since its start."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return 1024 * int(peaks[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_machine() -> dict[str, str | int | None]:
    """Processor and GPU by their names, cores, and the threads that PyTorch uses."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "gpu": gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
