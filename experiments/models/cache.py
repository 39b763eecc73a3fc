"""Networks kept on disk between runs: written atomically, verified when they are read."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jlcm.files import replacing

#: Name of the checksum among a file's metadata.
_CHECKSUM = "sha256"


def cache_folder() -> Path:
    """Return the folder of cached networks: `JLCM_CACHE`, by default ~/.cache/jlcm."""
    return Path(os.environ.get("JLCM_CACHE") or Path.home() / ".cache" / "jlcm")


def save_state(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors, so that a reader never sees half a file.

    Args:
        path: the file; its folder is made.
        state: tensors on any device.
        metadata: strings kept in the file's header.
    """
    # Clones: safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={**metadata, _CHECKSUM: _checksum(state)})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `save_state` wrote.

    Args:
        path: the file.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"cached {path} is damaged ({error}): delete it and run again") from error
    if metadata.pop(_CHECKSUM, None) != _checksum(state):
        raise ValueError(f"cached {path} is damaged (checksum differs): delete it and run again")
    return state, metadata


def _checksum(state: dict[str, torch.Tensor]) -> str:
    """Hash names, shapes, types and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
