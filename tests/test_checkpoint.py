"""The packed file: bit-exact reload, its layout read independently, and every kind of damage."""

import copy
import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cnn, Vit, build, small
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import jlcm
from jlcm.architecture import Architecture
from jlcm.layers import HalfTensor, stored_tensors
from jlcm.reading import CheckpointError, read_tensors

RANDOM = {"init": "random", "progress": False}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def same_buffers(one: nn.Module, other: nn.Module) -> bool:
    a, b = buffers(one), buffers(other)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Cnn, Vit])
@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "tiles", "trellis"])
def test_reload_is_bit_exact(network, kind, images, tmp_path):
    model = build(network)
    x = images[:, :, :8, :8] if network is Cnn else images
    encoding = jlcm.Encoding(kind=kind, tile=(8, 32), fold_bn=network is Cnn)
    packed = jlcm.compress(model, alpha=4.5, encoding=encoding, example_inputs=x[:1], **RANDOM)
    path = jlcm.save(packed, tmp_path / "new" / "folder" / "m.safetensors")
    with torch.device("meta"):
        empty = network()
    again = jlcm.load(path, model=empty)
    assert again is empty and not again.training
    assert same_buffers(again, packed)
    assert torch.equal(again(x), packed(x))
    assert asdict(again.compression) == json.loads(json.dumps(asdict(packed.compression)))
    # A second generation is the same file.
    other = jlcm.save(again, tmp_path / "again.safetensors")
    assert other.read_bytes() == path.read_bytes()


def test_file_is_determined_by_the_model(packed, tmp_path):
    one, other = (jlcm.save(copy.deepcopy(packed), tmp_path / n) for n in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_layout_read_without_the_library(packed, path):
    """Header length, JSON, payload; then Eq. 1 and 2 in numpy."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    index = json.loads(content[8 : 8 + length])
    metadata = index.pop("__metadata__")
    description = json.loads(metadata["jlcm"])
    payload = content[8 + length :]
    assert sum(b - a for a, b in (t["data_offsets"] for t in index.values())) == len(payload)
    kinds = {"U8": np.uint8, "F16": np.float16}
    tensors = {
        name: np.frombuffer(payload[slice(*t["data_offsets"])], kinds[t["dtype"]]).reshape(
            t["shape"]
        )
        for name, t in index.items()
    }
    assert description["format_version"] == 1 and description["architecture"] is None
    for name, layer in description["tensors"].items():
        bits, shape = layer["bits"], layer["shape"]
        stream = int.from_bytes(tensors[f"{name}.codes"].tobytes(), "little")
        books, scales = tensors[f"{name}.codebooks"], tensors.get(f"{name}.scales")
        count = shape[0] * shape[1]
        values = np.empty(count, np.float32)
        for p in range(count):
            code = stream >> (p * bits) & (2**bits - 1)
            values[p] = books[p * len(books) // count, code]
            if scales is not None:
                values[p] *= np.float32(scales[p * len(scales) // count])
        matrix = values.reshape(shape)
        if f"{name}.order" in tensors:
            stream = int.from_bytes(tensors[f"{name}.order"].tobytes(), "little")
            width = (shape[0] - 1).bit_length()
            order = [stream >> (r * width) & (2**width - 1) for r in range(shape[0])]
            matrix = matrix[np.argsort(order)]
        weight = packed.get_submodule(name.rpartition(".")[0]).weight
        assert np.array_equal(matrix, weight.numpy())
    assert np.array_equal(tensors["0.bias"], packed[0].bias.half().numpy())


SCRIPT = """
import hashlib, sys, torch, jlcm
for path, size in zip(sys.argv[1::2], sys.argv[2::2]):
    model = jlcm.load(path)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        output = model(torch.randn(2, 3, int(size), int(size), generator=generator))
    digest = hashlib.sha256(output.numpy().tobytes())
    for name, buffer in sorted(model.named_buffers()):
        digest.update(name.encode() + buffer.reshape(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
"""


def test_fresh_process_needs_only_the_file(tmp_path):
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    vit = {
        "model_name": "vit_tiny_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    cases = [
        ("torchvision.models:shufflenet_v2_x0_5", {"num_classes": 10}, 32),
        ("timm:create_model", vit, 32),
        ("timm:create_model", {"model_name": "test_efficientnet", "num_classes": 5}, 32),
    ]
    torch.manual_seed(0)
    arguments, expected = [], []
    for i, (builder, options, size) in enumerate(cases):
        if builder.startswith("timm"):
            model = timm.create_model(**options)
        else:
            model = torchvision.models.shufflenet_v2_x0_5(**options)
        packed = jlcm.compress(model, alpha=4.5, encoding="multi_codebook", **RANDOM)
        architecture = Architecture(builder=builder, arguments=options)
        path = jlcm.save(packed, tmp_path / f"{i}.safetensors", architecture=architecture)
        arguments += [str(path), str(size)]
        expected.append(digest_of(packed, size))
    script = [sys.executable, "-c", SCRIPT, *arguments]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        script, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == expected
    assert [digest_of(jlcm.load(p), 32) for p in arguments[::2]] == expected


def digest_of(model: nn.Module, size: int) -> str:
    """What `SCRIPT` prints, in this process."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        output = model(torch.randn(2, 3, size, size, generator=generator))
    digest = hashlib.sha256(output.numpy().tobytes())
    for name, buffer in sorted(model.named_buffers()):
        digest.update(name.encode() + buffer.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_dtype_and_device_on_loading(packed, path):
    half = jlcm.load(path, model=small(), dtype=torch.bfloat16, device="cpu")
    assert half[0].weight.dtype == torch.bfloat16 and half[0].bias.dtype == torch.bfloat16
    assert same_buffers(half, packed)


def test_file_can_be_replaced_while_a_model_uses_it(packed, path):
    model = jlcm.load(path, model=small())
    x = torch.ones(1, 12)
    expected = model(x)
    jlcm.save(model, path)
    other = jlcm.compress(small(), alpha=7.0, **RANDOM)
    jlcm.save(other, path)
    assert torch.equal(model(x), expected)
    assert same_buffers(jlcm.load(path, model=small()), other)


def test_tied_weights_are_written_once(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    model["b"].bias = model["a"].bias
    path = jlcm.save(jlcm.compress(model, alpha=3.5, **RANDOM), tmp_path / "m")
    header, tensors = read_tensors(path)
    assert header["tensors"]["b.weight"] == {"same_as": "a.weight"}
    assert not any(name.startswith("b.") for name in tensors)
    again = jlcm.load(path, model=nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}))
    assert again["a"].packed["weight"] is again["b"].packed["weight"]
    assert again["a"].packed["bias"] is again["b"].packed["bias"]


class Table(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table


def test_tensors_that_no_state_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("jlcm.architecture.TRUSTED_PACKAGES", (Table.__module__,))
    monkeypatch.setitem(sys.modules, Table.__module__, sys.modules[__name__])
    packed = jlcm.compress(Table(), alpha=2.5, **RANDOM)
    architecture = Architecture(builder=f"{Table.__module__}:Table")
    path = jlcm.save(packed, tmp_path / "m", architecture=architecture)
    x = torch.ones(1, 8)
    assert torch.equal(jlcm.load(path)(x), packed(x))
    with torch.device("meta"):
        model = Table()
    with pytest.raises(CheckpointError, match="no values for table"):
        jlcm.load(path, model=model)


# Writing -----------------------------------------------------------------------------------------


def test_only_compressed_models_are_saved(tmp_path):
    for model in (small(), nn.Module()):
        with pytest.raises(ValueError, match="only a model that jlcm.compress returned"):
            jlcm.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_no_room_on_the_disk(packed, path, monkeypatch):
    before = path.read_bytes()
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OSError, match="bytes are needed, 1000 are free"):
        jlcm.save(packed, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_failed_writes_leave_the_old_file(packed, path, monkeypatch, step, error):
    before = path.read_bytes()

    def fail(*arguments):
        raise error

    monkeypatch.setattr(f"jlcm.checkpoint.{step}", fail)
    with pytest.raises(type(error)):
        jlcm.save(jlcm.compress(small(), alpha=7.0, **RANDOM), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_write_that_stops_half_way(packed, path, monkeypatch):
    before = path.read_bytes()

    def half(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr("jlcm.checkpoint.save_file", half)
    with pytest.raises(OSError, match="cannot write .* no space left"):
        jlcm.save(packed, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_target_is_a_folder(packed, tmp_path):
    with pytest.raises(OSError):
        jlcm.save(packed, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_file_is_readable_by_others(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_no_original_weight_is_in_the_file(packed, path):
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert names == {
        f"{n}.{p}" if not isinstance(s, HalfTensor) else n
        for n, s in stored_tensors(packed)
        for p in ([""] if isinstance(s, HalfTensor) else ["codes", "codebooks", "scales", "order"])
        if isinstance(s, HalfTensor) or getattr(s, p) is not None
    }
