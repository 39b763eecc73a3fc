"""The byte accountant against sizes counted independently."""

import json
import math
import os
import struct
import sys

import pytest
from conftest import Cnn, build

import jlcm
from jlcm.architecture import Architecture
from jlcm.reading import CheckpointError

RANDOM = {"init": "random", "progress": False}


def tensor_bytes(path) -> dict[str, int]:
    """Bytes of every tensor of a safetensors file, from its own index."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        index = json.loads(file.read(length))
    index.pop("__metadata__")
    return {name: t["data_offsets"][1] - t["data_offsets"][0] for name, t in index.items()}


def header_bytes(path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "auto"])
def test_every_byte_is_accounted_for(networks, name, kind, tmp_path):
    model, _ = networks[name]
    packed = jlcm.compress(model, alpha=4.5, encoding=kind, reorder="stored", **RANDOM)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    sizes = tensor_bytes(path)
    memory, file = jlcm.footprint(packed), jlcm.footprint(path)

    def total(suffix: str) -> int:
        return sum(size for key, size in sizes.items() if key.endswith(suffix))

    for footprint in (memory, file):
        assert footprint.codes == total(".codes")
        assert footprint.codebooks == total(".codebooks")
        assert footprint.scales == total(".scales")
        assert footprint.orders == total(".order")
        assert footprint.payload == sum(sizes.values())
        parts = footprint.codes + footprint.codebooks + footprint.scales + footprint.orders
        assert footprint.other == footprint.payload - parts
        weights = [p for n, p in model.named_parameters() if p.dim() > 1 and "position" not in n]
        weights = [p for p in weights if p.shape[0] > 1]
        assert footprint.reference_layers == sum(2 * p.numel() for p in weights)
        assert footprint.alpha_layers == footprint.reference_layers / parts >= 4.5
        floating = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
        assert footprint.reference_total == sum(2 * t.numel() for t in floating)
        assert sum(layer.nbytes for layer in footprint.layers) == parts
    assert file.file_bytes == os.path.getsize(path) == header_bytes(path) + file.payload
    assert file.header == header_bytes(path)
    assert file.alpha_total == file.reference_total / file.file_bytes
    assert memory.file_bytes is None and memory.header == 0
    assert memory.alpha_total == memory.reference_total / memory.payload
    # Same layers in the same order, up to the digits of the error that the file keeps.
    for one, other in zip(memory.layers, file.layers, strict=True):
        assert one.name == other.name and one.nbytes == other.nbytes
        assert one.shape == other.shape and one.bits == other.bits
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)
    assert [layer.name for layer in file.layers] == [
        n for n, p in model.named_parameters() if any(layer.name == n for layer in file.layers)
    ]


def test_layers_show_sizes_and_errors(mlp):
    packed = jlcm.compress(mlp, alpha=4.5, encoding="multi_codebook", reorder="stored", **RANDOM)
    for layer in jlcm.footprint(packed).layers:
        module = packed.get_submodule(layer.name.rpartition(".")[0])
        original = mlp.get_submodule(layer.name.rpartition(".")[0]).weight
        stored = module.packed["weight"]
        assert layer.codebooks == len(stored.codebooks) and layer.scales == 0
        assert layer.stored_order == (stored.order is not None)
        assert layer.nbytes == sum(b.numel() * b.element_size() for b in stored.buffers())
        error = float((module.weight - original.detach()).norm() / original.detach().norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-4)
        entropy_bound = original.numel() * layer.bits / 8
        assert layer.nbytes >= entropy_bound


def test_dictionary_is_plain_numbers(mlp):
    footprint = jlcm.footprint(jlcm.compress(mlp, alpha=4.5, **RANDOM))
    values = footprint.as_dict()
    assert "layers" not in values and json.loads(json.dumps(values)) == values
    assert all(math.isfinite(v) for v in values.values() if v is not None)


def test_path_needs_no_architecture(mlp, tmp_path):
    packed = jlcm.compress(mlp, alpha=4.5, **RANDOM)
    plain = jlcm.save(packed, tmp_path / "plain")
    # An architecture that cannot be built here changes the header only.
    named = jlcm.save(
        packed, tmp_path / "named", architecture=Architecture(builder="timm:no_such_network")
    )
    one, other = jlcm.footprint(plain), jlcm.footprint(str(named))
    assert one.payload == other.payload and one.header < other.header


def test_plain_networks_have_no_footprint(mlp, tmp_path):
    with pytest.raises(ValueError, match="only a compressed model has a footprint"):
        jlcm.footprint(mlp)
    with pytest.raises(CheckpointError, match="no such file"):
        jlcm.footprint(tmp_path / "none")


def test_header_grows_slowly(tmp_path):
    path = jlcm.save(jlcm.compress(build(Cnn), alpha=4.5, **RANDOM), tmp_path / "m")
    layers = len(jlcm.footprint(path).layers)
    assert header_bytes(path) <= 2000 + 800 * layers


def test_resident_memory_of_a_bad_file_names_the_cause(tmp_path):
    with pytest.raises(RuntimeError, match="no such file"):
        jlcm.resident_bytes(tmp_path / "none.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set sizes of Linux")
def test_resident_memory_is_the_payload(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    packed = jlcm.compress(torchvision.models.resnet18(num_classes=10), alpha=7.5, **RANDOM)
    path = jlcm.save(
        packed,
        tmp_path / "resnet18.safetensors",
        architecture=Architecture(
            builder="torchvision.models:resnet18", arguments={"num_classes": 10}
        ),
    )
    payload = jlcm.footprint(path).payload
    assert jlcm.resident_bytes(path) <= 1.3 * payload
