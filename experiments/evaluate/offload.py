"""Weights on disk, read for each forward by accelerate, and the page cache that hides the disk."""

import copy
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from jlcm.config import Invalid


def check_offload() -> None:
    """Check that accelerate is there.

    Raises:
        Invalid: (a ValueError) saying what to install.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise Invalid(
            "weights on disk need accelerate: pip install -c constraints.txt -e '.[latency]'"
        ) from error


def offloaded(
    module: nn.Module, folder: Path, *, device: torch.device, memory_limit: int
) -> nn.Module:
    """Move a copy's weights to disk; a layer's are read when it runs, and dropped after it.

    Args:
        module: the network.
        folder: for the files, one per tensor; it must not hold any yet.
        device: where the network runs.
        memory_limit: bytes that weights may take on `device`: the first layers stay there, with
            room for the largest of the others. Where all of them fit, all go to disk, because it
            is the disk that is measured.

    Returns:
        The copy.

    Raises:
        Invalid: (a ValueError) where accelerate is missing.
    """
    check_offload()
    from accelerate import disk_offload, dispatch_model, infer_auto_device_map

    module = copy.deepcopy(module).to("cpu")
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    # It reads the weights of its children itself, so all of them have to come together.
    attention = ["MultiheadAttention"]
    # Names as accelerate has them: it takes torch.device("cpu") for another place than "cpu".
    here = "cpu" if device.type == "cpu" else device.index or 0
    places = {"": "disk"}
    if size > memory_limit:
        places = infer_auto_device_map(
            module,
            max_memory={"cpu": 0, here: memory_limit},
            no_split_module_classes=attention,
        )
    if set(places.values()) == {"disk"}:
        return disk_offload(
            module, folder, execution_device=device, preload_module_classes=attention
        )
    return dispatch_model(
        module,
        places,
        main_device=here,
        offload_dir=folder,
        preload_module_classes=attention,
    )


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget the content of all files in a folder, so that it is read again.

    Not every system can be asked, and only `read_from_disk` tells whether it obeyed.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not written yet cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read_from_disk() -> int | None:
    """Bytes that this process has made the system read from disks; None where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None
