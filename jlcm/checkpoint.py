"""One safetensors file per compressed network (`docs/format.md` describes it byte by byte)."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jlcm.architecture import Architecture, unregistered_meta
from jlcm.compress import Compression
from jlcm.expanded import ExpandedWeight
from jlcm.files import replacing
from jlcm.layers import (
    STORE,
    WHEN_PACKED,
    Constant,
    HalfTensor,
    Stored,
    is_static_norm,
    linearise,
    store,
    store_norm,
    stored_tensors,
    unclip,
)
from jlcm.packed import PackedWeight, StoredWeight
from jlcm.reading import (
    FORMAT_VERSION,
    CheckpointError,
    digest,
    read_config,
    read_header,
    read_tensors,
)
from jlcm.uniform import UniformWeight


def save(
    model: nn.Module, path: str | os.PathLike, *, architecture: Architecture | None = None
) -> Path:
    """Write a compressed model to one file, atomically.

    Args:
        model: returned by `jlcm.compress`, `jlcm.quantize` or `jlcm.load`.
        path: usually *.safetensors; its folder is made if needed.
        architecture: how `jlcm.load` rebuilds the network; by default the one that the model was
            loaded with, or a transformers model's own. Without any, `jlcm.load` must be given a
            network of the same architecture.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not compressed.
        OSError: if the disk has no room; nothing is left half-written.
    """
    path = Path(path)
    if not isinstance(getattr(model, "compression", None), Compression):
        raise ValueError("only a model that jlcm.compress returned can be saved")
    architecture = architecture or getattr(model, "architecture", None)
    tensors, header = describe(model)
    header["architecture"] = None if architecture is None else asdict(architecture)
    header["blake2b"] = digest(header, tensors)
    # One entry, because safetensors writes several in a random order.
    metadata = {"jlcm": json.dumps(header, separators=(",", ":"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    needed += sum(len(text) for text in metadata.values()) + 2**16
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            f"no room for {path}: {needed} bytes are needed, {free} are free; "
            "free some space or choose another folder"
        )
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def load(
    path: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    into: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Any:
    """Load a compressed network without its original weights.

    The file is mapped, not read: on the CPU the codes stay in the page cache until they are used.

    Args:
        path: written by `jlcm.save`, or a folder written by `save_pretrained` of a packed
            transformers model, which its `from_pretrained` then loads.
        model: a network of the same architecture (any weights, meta device welcome), used up;
            needed only if the file names no architecture.
        into: a pipeline of diffusers, whose components take the packed ones of the file
            (`jlcm.pipeline_network`) in the place of theirs.
        device: where the network runs; None for the CPU, or where the pipeline is.
        dtype: floating dtype of the computation; None for that of the saved network. In models of
            transformers buffers keep theirs, as in its `from_pretrained`.
        verify: check the file's blake2b, which reads it once; a folder's always is.

    Returns:
        The network, packed, in evaluation mode, or the pipeline.

    Raises:
        CheckpointError: file missing, truncated, tampered with, of another format version, or not
            fitting the architecture or the pipeline.
    """
    if into is not None:
        home = into.device if device is None else device
        model = _like(path, into)
        return put_into(into, load(path, model=model, device=home, dtype=dtype, verify=verify))
    device = "cpu" if device is None else device
    if Path(path).is_dir():
        return _load_folder(path, model, device, dtype)
    header, tensors = read_tensors(path, verify=verify)
    if model is None:
        architecture = _architecture(path, header["architecture"])
        model = _build(path, architecture)
        model.architecture = architecture
    try:
        fill(model, header, tensors)
        check_filled(model)
        model.compression = Compression(**header["compression"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {error}") from error
    model = model.eval().to(device)
    return model if dtype is None else getattr(model, "compute_in", model.to)(dtype)


def put_into(pipeline: Any, network: nn.Module) -> Any:
    """Set the components of a pipeline of diffusers, in place; returns the pipeline.

    Raises:
        ValueError: the network has none, or the pipeline has no such components.
    """
    components = getattr(network, "components", None)
    if not components:
        raise ValueError(f"{type(network).__name__} is no network of jlcm.pipeline_network")
    if lacking := sorted(components.keys() - pipeline.components.keys()):
        raise ValueError(f"{type(pipeline).__name__} has no component {', '.join(lacking)}")
    for name, component in components.items():
        setattr(pipeline, name, component)
    return pipeline


def _like(path: str | os.PathLike, pipeline: Any) -> nn.Module:
    """An empty network of the classes and sizes that a pipeline's components have."""
    described = read_header(path)["architecture"] or {}
    names = described.get("arguments", {}).get("components", {})
    if not names:
        raise CheckpointError(f"{path}: names no components of a pipeline, load it without into=")
    kind = type(pipeline).__name__
    try:
        architecture = Architecture.of_pipeline(pipeline, list(names))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit {kind}: {error}") from error
    for name, found in architecture.arguments["components"].items():
        theirs, ours = (d["builder"].partition(":")[2] for d in (names[name], found))
        if theirs != ours:
            raise CheckpointError(f"{path}: its {name} is a {theirs}, that of {kind} a {ours}")
    model = _build(path, architecture)
    model.architecture = architecture
    return model


def _load_folder(
    path: str | os.PathLike,
    model: nn.Module | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> nn.Module:
    """What `from_pretrained` makes of a folder; it calls back into jlcm."""
    if model is not None:
        raise CheckpointError(f"{path}: a folder says what to build, load it without model=")
    if (Path(path) / "model_index.json").is_file():
        raise CheckpointError(f"{path}: a folder of a pipeline, call jlcm.load_pipeline")
    kind = _architecture(path, read_config(path)[1]).model_class()
    return kind.from_pretrained(path, dtype="auto" if dtype is None else dtype).to(device)


def _architecture(path: str | os.PathLike, described: dict[str, Any] | None) -> Architecture:
    if described is None:
        raise CheckpointError(f"{path}: names no architecture, pass jlcm.load(path, model=...)")
    try:
        return Architecture(**described)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot build its architecture: {error}") from error


def _build(path: str | os.PathLike, architecture: Architecture) -> nn.Module:
    try:
        return architecture.build()
    except Exception as error:  # whatever the builder raises for its arguments
        raise CheckpointError(f"{path}: cannot build its architecture: {error}") from error


def describe(
    model: nn.Module, *, derived_buffers: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a packed file says of a compressed model, without architecture and checksum.

    Args:
        model: compressed.
        derived_buffers: with the buffers that a state dict leaves out (`persistent=False`).

    Returns:
        The tensors by name, on the CPU, and the description (`docs/format.md`).
    """
    tensors: dict[str, Tensor] = {}
    descriptions: dict[str, Any] = {}
    first_name: dict[int, str] = {}
    dtypes: dict[str, str] = {}
    folded: list[str] = []  # batch norms that apply nothing any more
    for name, stored in [*stored_tensors(model), *plain_buffers(model, derived_buffers)]:
        if id(stored) in first_name:
            descriptions[name] = {"same_as": first_name[id(stored)]}
            continue
        first_name[id(stored)] = name
        match stored:
            case StoredWeight():
                descriptions[name] = stored.describe()
                tensors |= {f"{name}.{part}": held for part, held in stored.named_buffers()}
            case HalfTensor():
                tensors[name] = stored.values
            case Tensor():
                tensors[name] = stored
            case Constant() if name.rpartition(".")[2] == "weight":
                folded.append(name.rpartition(".")[0])
        if isinstance(stored, StoredWeight | HalfTensor) and stored.dtype.is_floating_point:
            dtypes[name] = str(stored.dtype).removeprefix("torch.")
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    for name, dtype in dtypes.items():
        if dtype != usual:
            descriptions.setdefault(name, {})["dtype"] = dtype
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": usual,
        "compression": asdict(model.compression),
        "tensors": descriptions,
        "folded": folded,
    }
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, header


def plain_buffers(model: nn.Module, derived: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Buffers of the original layers, with those that a state dict leaves out if `derived`."""
    stores = {id(part) for _, stored in stored_tensors(model) for part in stored.modules()}
    for name, module in model.named_modules():
        if id(module) not in stores:
            for buffer_name, buffer in module.named_buffers(recurse=False):
                if derived or buffer_name not in module._non_persistent_buffers_set:
                    yield (f"{name}.{buffer_name}" if name else buffer_name), buffer


def fill(model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a freshly built network by what the file holds.

    Args:
        model: with tensors of any content, on any device; what the file lacks stays as it is.
        header: description of the file.
        tensors: of the file, by name; on the meta device they get their content later.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: if the file does not fit the network.
    """
    unclip(model, header["compression"].get("relu", []))
    linearise(model, header["compression"].get("linear", []))
    stored: dict[str, Stored] = dict(packed_weights(header, tensors))
    modules = dict(model.named_modules())
    parts = {f"{n}.{part}" for n, held in stored.items() for part, _ in held.named_buffers()}
    names = {*stored, *tensors, *header["tensors"]} - parts
    if strangers := sorted(n for n in names if n.rpartition(".")[0] not in modules):
        raise ValueError(f"the network has no layer for {', '.join(strangers[:5])}")
    owned: dict[str, dict[str, Stored]] = {}
    for name in sorted(names - stored.keys()):
        description = header["tensors"].get(name, {})
        first = description.get("same_as", name)
        owner, _, attribute = name.rpartition(".")
        buffers = modules[owner]._buffers
        if first in tensors and attribute in buffers and not is_static_norm(modules[owner]):
            _check_shape(name, buffers[attribute], tensors[first].shape)
            buffers[attribute] = tensors[first]
            continue
        if first not in stored:
            dtype = _dtype(description.get("dtype", header["dtype"]))
            values = tensors[first]
            stored[first] = HalfTensor(
                values, dtype if values.is_floating_point() else values.dtype
            )
        stored[name] = stored[first]
    for name, value in stored.items():
        owner, _, attribute = name.rpartition(".")
        shape = value.shape if isinstance(value, StoredWeight) else value.values.shape
        _check_shape(name, getattr(modules[owner], attribute), shape)
        owned.setdefault(owner, {})[attribute] = value
    for name, module in modules.items():
        mine = owned.get(name, {})
        if is_static_norm(module):
            if name in header["folded"]:
                store_norm(module, None, dtype=_dtype(header["dtype"]))
            elif mine:
                vectors = mine["weight"].values, mine["bias"].values
                store_norm(module, vectors, dtype=mine["weight"].dtype)
        elif mine:
            store(module, mine)
    for adapt in WHEN_PACKED:
        adapt(model)


def check_filled(model: nn.Module) -> None:
    """Raise KeyError if a network has tensors that are not the file's."""
    # Every parameter is stored by now; a buffer is real unless the file lacks it.
    missing = [n for n, _ in model.named_parameters()]
    missing += [n for n, b in model.named_buffers() if b.is_meta]
    norms = [(n, m) for n, m in model.named_modules() if is_static_norm(m)]
    missing += [n for n, m in norms if STORE not in m._modules]
    missing += unregistered_meta(model)
    if missing:
        raise KeyError(f"the file has no values for {', '.join(missing[:5])}")


def packed_weights(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, StoredWeight]:
    """The packed weights of a file (`read_tensors`), by name.

    Raises:
        KeyError, TypeError, ValueError: if the parts do not fit together.
    """
    packed = {}
    for name, description in header["tensors"].items():
        if "bits" in description:
            dtype = _dtype(description.get("dtype", header["dtype"]))
            packed[name] = _weight(description, _under(f"{name}.", tensors), dtype)
    return packed


def _weight(
    description: dict[str, Any], parts: dict[str, Tensor], dtype: torch.dtype
) -> StoredWeight:
    error = description.get("relative_error", float("nan"))
    match description.get("kind", "codebooks"):
        case "expanded":
            base = _weight(description["base"], _under("base.", parts), dtype)
            terms = [
                _weight(term, _under(f"terms.{i}.", parts), dtype)
                for i, term in enumerate(description["terms"])
            ]
            own = {name: part for name, part in parts.items() if "." not in name}
            sparse = {"gap_bits": description["gap_bits"], "relative_error": error}
            return ExpandedWeight(base, terms=terms, **own, **sparse)
        case "uniform":
            kind, layout = UniformWeight, {"group": description.get("group")}
        case "codebooks" | "rotated" as stored:
            tile, memory = description.get("tile"), description.get("memory", 0)
            kind, layout = PackedWeight, {"tile": tile, "memory": memory}
            layout["rotated"] = stored == "rotated"
        case other:
            raise ValueError(f"unknown kind of weight {other!r}")
    sizes = {"shape": description["shape"], "bits": description["bits"]}
    return kind(**sizes, **layout, **parts, dtype=dtype, relative_error=error)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def _check_shape(name: str, expected: Tensor | None, shape: torch.Size) -> None:
    # A bias that the architecture lacks comes from a folded batch norm.
    if expected is not None and tuple(expected.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(shape)}, {tuple(expected.shape)} is expected")
