"""Finished parts of a learning stage on disk, so that an interrupted run goes on from there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jlcm.files import replacing
from jlcm.layers import Stored
from jlcm.locks import exclusive


@contextmanager
def stage_folder(
    folder: Path | None, settings: str, tensors: dict[str, Tensor], inputs: list[Tensor]
) -> Iterator[Path | None]:
    """Where a stage keeps its finished parts, named by a hash of all that decides its result.

    It is locked meanwhile: a run that begins alike waits, and then reads the parts.

    Args:
        folder: that several runs may share; None to keep nothing, which yields None.
        settings: options and seed.
        tensors: of the network by name, as they are before the stage (`stored_buffers`).
        inputs: calibration inputs.
    """
    if folder is None:
        yield None
        return
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in [*tensors.items(), *(("input", batch) for batch in inputs)]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy())
    path = Path(folder) / digest.hexdigest()
    if path.exists() and not os.access(folder, os.W_OK):  # finished parts can be read all the same
        yield path
        return
    with exclusive(path):
        yield path


def stored_buffers(store: dict[str, Stored]) -> dict[str, Tensor]:
    """All buffers of stored tensors, as "name of the tensor buffer"."""
    return {f"{name} {key}": t for name, held in store.items() for key, t in held.named_buffers()}


def save_part(path: Path, parts: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the tensors of a finished part, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"run": path.parent.name, **metadata})


def restore_part(path: Path, parts: dict[str, Tensor]) -> dict[str, str]:
    """Read a finished part into its tensors; returns its metadata.

    Raises:
        ValueError: as `read_part`.
    """
    metadata, tensors = read_part(path)
    for name, tensor in parts.items():
        tensor.copy_(tensors[name])
    return metadata


def read_part(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a finished part.

    Raises:
        ValueError: the file is damaged, or of another run than its folder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("run") != path.parent.name:
                raise ValueError(
                    f"{path} belongs to a run with other options, weights or calibration inputs: "
                    "remove it"
                )
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start anew") from error
