"""The byte accountant: what a compressed network costs, in the file and in memory."""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch
from torch import nn

from jlcm.checkpoint import packed_weights
from jlcm.compress import Compression
from jlcm.layers import stored_tensors
from jlcm.packed import StoredWeight, nbytes
from jlcm.reading import CheckpointError, packed_files, read_tensors


@dataclass(frozen=True, kw_only=True)
class LayerFootprint:
    """One compressed tensor.

    Attributes:
        name: full name of the tensor.
        shape: of the weight.
        bits: width of a code.
        codebooks: number of codebooks.
        scales: number of scales.
        outliers: number of sparse outliers.
        stored_order: whether an order of its rows is stored.
        nbytes: codes, codebooks, scales, order and outliers.
        relative_error: ||decoded - W|| / ||W|| (Frobenius norms), nan where it is not known.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    codebooks: int
    scales: int
    outliers: int
    stored_order: bool
    nbytes: int
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a compressed network.

    Attributes:
        codes: bytes of codes.
        codebooks: bytes of codebooks.
        scales: bytes of scales, zero points and exponents.
        orders: bytes of stored orders of rows, and of masks of rows.
        outliers: bytes of sparse outliers and their positions.
        other: bytes of everything else that is stored (biases, norms, embeddings, buffers).
        payload: all of these, which is also what the loaded network holds in memory.
        header: bytes of the file beside the payload (names, description), 0 without a file.
        file_bytes: size of the file, None without a file; of a folder written by
            `save_pretrained`, config.json and the files of the weights.
        reference_layers: fp16 bytes of the compressed tensors.
        reference_total: fp16 bytes of the original model, parameters and floating buffers.
        alpha_layers: reference_layers over codes + codebooks + scales + orders + outliers.
        alpha_total: reference_total over file_bytes (over the payload without a file).
        layers: one entry per compressed tensor.
    """

    codes: int
    codebooks: int
    scales: int
    orders: int
    outliers: int
    other: int
    payload: int
    header: int
    file_bytes: int | None
    reference_layers: int
    reference_total: int
    alpha_layers: float
    alpha_total: float
    layers: tuple[LayerFootprint, ...]

    def as_dict(self) -> dict:
        """Plain numbers, without the layers."""
        return {k: v for k, v in asdict(self).items() if k != "layers"}


def footprint(model: nn.Module | str | os.PathLike) -> Footprint:
    """Account for every byte of a compressed network.

    Args:
        model: returned by `jlcm.compress`, `jlcm.quantize` or `jlcm.load`, or the path of a packed
            file or folder.

    Returns:
        Bytes by what they hold, ratios, and an entry for each compressed tensor.

    Raises:
        ValueError: if the model is not compressed, or the file cannot be read.
    """
    if isinstance(model, nn.Module):
        if not isinstance(getattr(model, "compression", None), Compression):
            raise ValueError("only a compressed model has a footprint: call jlcm.compress first")
        file_bytes, reference_total = None, model.compression.reference_bytes
        weights = [(n, s) for n, s in stored_tensors(model) if isinstance(s, StoredWeight)]
        payload = sum(nbytes(b) for b in model.buffers())
    else:
        header, tensors = read_tensors(model, verify=False)
        try:
            weights = list(packed_weights(header, tensors).items())
            reference_total = header["compression"]["reference_bytes"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{model}: is damaged: {error}") from error
        file_bytes = sum(os.path.getsize(file) for file in packed_files(model))
        payload = sum(nbytes(t) for t in tensors.values())
    parts = dict.fromkeys(("codes", "codebooks", "scales", "orders", "outliers"), 0)
    layers: dict[int, LayerFootprint] = {}
    for name, stored in weights:
        if id(stored) not in layers:  # shared weights are stored once
            sizes = stored.sizes()
            parts = {k: v + sizes.get(k, 0) for k, v in parts.items()}
            layers[id(stored)] = _layer(name, stored, sum(sizes.values()))
    packed = sum(parts.values())
    reference = sum(2 * torch.Size(layer.shape).numel() for layer in layers.values())
    return Footprint(
        **parts,
        other=payload - packed,
        payload=payload,
        header=0 if file_bytes is None else file_bytes - payload,
        file_bytes=file_bytes,
        reference_layers=reference,
        reference_total=reference_total,
        alpha_layers=reference / packed,
        alpha_total=reference_total / (file_bytes or payload),
        layers=tuple(layers.values()),
    )


def resident_bytes(path: str | os.PathLike) -> int:
    """Resident memory that loading a packed file takes, in a fresh process.

    The rise of the process's resident set size from just before to just after `jlcm.load`, with the
    libraries imported and the file loaded once before, so that code is not counted.

    Args:
        path: of a packed file that names its architecture, or of a folder.

    Returns:
        Bytes.

    Raises:
        RuntimeError: if the process fails.
    """
    result = subprocess.run(
        [sys.executable, "-m", "jlcm.resident", str(path)], capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"cannot measure the memory of {path}: {last}")
    return int(result.stdout.split()[-1])


def _layer(name: str, stored: StoredWeight, size: int) -> LayerFootprint:
    codebooks, scales = stored.groups()
    values = getattr(stored, "values", None)
    return LayerFootprint(
        name=name,
        shape=stored.shape,
        bits=stored.bits,
        codebooks=codebooks,
        scales=scales,
        outliers=0 if values is None else values.numel(),
        stored_order=getattr(stored, "order", None) is not None,
        nbytes=size,
        relative_error=stored.relative_error,
    )
