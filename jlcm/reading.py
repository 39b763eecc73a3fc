"""Packed files and folders, read and checked without building the network.

A folder is what `save_pretrained` of a packed transformers model writes (`docs/huggingface.md`):
config.json with the description, and one or several safetensors files.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT_VERSION = 1
#: Value of `quant_method` in the config.json of a folder.
METHOD = "jlcm"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A packed file cannot be read: it names the file, the cause and the way out."""


def read_tensors(
    path: str | os.PathLike, *, verify: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a packed file or folder, by their names in it.

    Args:
        path: written by `jlcm.save`, or a folder written by `save_pretrained`.
        verify: check the blake2b, which reads everything once.

    Returns:
        The description, as `docs/format.md` lists it, and the tensors, mapped and not read.

    Raises:
        CheckpointError: missing, truncated, tampered with, or of another format version.
    """
    path = Path(path)
    architecture: dict[str, Any] = {}
    if path.is_dir():
        header, built = read_config(path)
        architecture = {"architecture": built}
        tensors = read_shards(packed_files(path)[1:], header)
    elif path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                header = _read_header(path, file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a packed file ({error})") from error
    else:
        raise CheckpointError(f"{path}: no such file")
    checksum = header.pop("blake2b", None)
    if verify and digest(header, tensors) != checksum:
        raise damaged(path)
    return header | architecture, tensors


def damaged(path: str | os.PathLike) -> CheckpointError:
    """The error for content that is not what was written."""
    return CheckpointError(
        f"{path}: its content does not match its blake2b, the file is damaged or was changed; "
        "fetch or write it again"
    )


def packed_files(path: str | os.PathLike) -> list[Path]:
    """The files that make up a packed file (itself) or folder (its config.json first).

    Raises:
        CheckpointError: if a folder lacks one.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    index = path / f"{_WEIGHTS}.index.json"
    names: Iterable[str] = [_WEIGHTS]
    if index.is_file() and not (path / _WEIGHTS).is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
            if not all(isinstance(n, str) and Path(n).name == n for n in names):
                raise ValueError("it names files elsewhere")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: cannot be read ({error})") from error
    files = [path / name for name in (_CONFIG, *names)]
    for file in files:
        if not file.is_file():
            raise _lacks(file)
    return [*files, index] if len(files) > 2 else files


def _lacks(file: Path) -> CheckpointError:
    return CheckpointError(f"{file.parent}: lacks {file.name}; fetch or write it again")


def read_shards(files: Iterable[str | os.PathLike], header: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a folder's safetensors files, by the names they have in a packed file.

    Args:
        files: the safetensors files; others are passed over.
        header: description in the folder's config.json.

    Returns:
        The tensors, mapped and not read.

    Raises:
        CheckpointError: if a file is missing, truncated, or no safetensors file.
    """
    usual = {there: name for name, there in folder_names(header).items()}
    tensors = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            continue
        if not Path(path).is_file():
            raise _lacks(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[usual.get(name, name)] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or no safetensors file ({error})") from error
    return tensors


def folder_names(header: dict[str, Any]) -> dict[str, str]:
    """Names of tensors that a folder keeps under another name than a packed file.

    The codes of a weight have the weight's own name there. Without jlcm transformers only warns
    that it does not know the method, and would fill each packed layer with random numbers. As the
    shape of the codes is not that of the weight, it stops with an error.

    Args:
        header: description, with `tensors`.

    Returns:
        Names in the folder by the names in a packed file.

    Raises:
        CheckpointError: if the description is malformed.
    """
    try:
        return {
            f"{name}.{_codes(description)}": name
            for name, description in header["tensors"].items()
            if "bits" in description
        }
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"a description of tensors cannot be read ({error!r})") from error


def _codes(description: dict[str, Any]) -> str:
    """Name of a weight's codes (those of a sum's base) below its own."""
    if description.get("kind") == "expanded":
        return f"base.{_codes(description['base'])}"
    return "codes"


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON description in a packed file (format version, architecture, tensors, ...).

    Raises:
        CheckpointError: as `read_tensors`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _read_header(Path(path), file.metadata())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a packed file ({error})") from error


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if not metadata or "jlcm" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one that jlcm.save wrote")
    try:
        header = json.loads(metadata["jlcm"])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its description cannot be read ({error})") from error
    check_version(path, version)
    return header


def check_version(path: str | os.PathLike, version: Any) -> None:
    """Refuse what another version of the format describes.

    Raises:
        CheckpointError: always, unless it is `FORMAT_VERSION`.
    """
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this jlcm reads version {FORMAT_VERSION}; "
            "install the jlcm that wrote it, or write it again"
        )


def read_config(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Description in a folder's config.json, and the architecture that follows from the rest.

    Raises:
        CheckpointError: if it is no folder with a packed model.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {_CONFIG}, so it holds no packed model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        header = config.pop("quantization_config", None)
        names = config.get("architectures") or [None]
        found = isinstance(header, dict) and header.pop("quant_method", None) == METHOD
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not found:
        raise CheckpointError(
            f"{path}: has no quantization_config of jlcm, so the folder holds no packed model; "
            "compress it with jlcm.compress, and save what that returns"
        )
    check_version(path, header.get("format_version"))
    built = {"builder": f"transformers:{names[0]}", "arguments": {"config": config}}
    return header, None if names[0] is None else built


def digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """BLAKE2b, in hexadecimal, of a description and the tensors it describes."""
    checksum = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()
