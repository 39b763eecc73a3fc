"""Networks and data kept on disk between runs: written atomically, verified when they are read."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jlcm.files import replacing
from jlcm.locks import once

#: Name of the checksum among a file's metadata.
_CHECKSUM = "sha256"
#: File of a cached folder with the hash of each other file, as `sha256sum -c` reads it.
CHECKSUMS = "SHA256SUMS"


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
        save_file(state, temporary, metadata={**metadata, _CHECKSUM: checksum(state)})


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
    if metadata.pop(_CHECKSUM, None) != checksum(state):
        raise ValueError(f"cached {path} is damaged (checksum differs): delete it and run again")
    return state, metadata


def checksum(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, types and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Make a folder of files on first use, and verify it each time.

    Args:
        name: of the folder below `cache_folder()`.
        fill: writes the files into the folder that it is given.

    Raises:
        ValueError: a file is missing or damaged.
    """
    folder = cache_folder() / name
    with once(folder / CHECKSUMS, lock=folder) as missing:
        if missing:
            with replacing_folder(folder) as temporary:
                fill(temporary)
    verify_folder(folder)
    return folder


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically, with its files' checksums; it replaces one that is there.

    Args:
        path: the folder.

    Yields:
        A folder beside it, which takes its place at the end.

    Raises:
        OSError: it cannot be written; nothing is left over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        files = [path for path in temporary.rglob("*") if path.is_file()]
        names = sorted(path.relative_to(temporary).as_posix() for path in files)
        lines = [f"{hash_file(temporary / name)}  {name}\n" for name in names]
        (temporary / CHECKSUMS).write_text("".join(lines))
        for name in (*names, CHECKSUMS):
            os.chmod(temporary / name, 0o644)  # safetensors makes files private
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        for inner in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            os.chmod(inner, 0o755)  # mkdtemp makes folders private
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify_folder(path: Path) -> None:
    """Check the files of a folder that `replacing_folder` wrote.

    Raises:
        ValueError: a file is missing or damaged.
    """
    for line in (path / CHECKSUMS).read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (path / name).is_file() or hash_file(path / name) != expected:
            raise ValueError(f"cached {path / name} is damaged: delete {path} and run again")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
