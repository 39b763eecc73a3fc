"""The packed file: every kind of damage, forged descriptions and architectures that do not fit."""

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import jlcm
from jlcm.architecture import Architecture
from jlcm.reading import CheckpointError, digest, read_header, read_tensors

RANDOM = {"init": "random", "progress": False}


def rewrite(path: Path, change) -> Path:
    """Write the file again with a changed description and a matching digest, as a forger would."""
    header, tensors = read_tensors(path)
    tensors = {n: t.clone() for n, t in tensors.items()}
    change(header, tensors)
    checksum = digest(header, tensors)
    save_file(tensors, path, {"jlcm": json.dumps({**header, "blake2b": checksum})})
    return path


# Damage ------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_the_header_is_noticed(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = read_tensors(path)
    damaged = path.with_name("damaged")
    for position in range(8 + length):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 7)
        damaged.write_bytes(flipped)
        try:
            found, values = read_tensors(damaged)
        except CheckpointError as error:
            assert str(damaged) in str(error)
            continue
        # Harmless: white space, or a change that leaves the meaning as it was.
        assert found == header and values.keys() == tensors.keys()
        assert all(torch.equal(values[n], tensors[n]) for n in tensors)


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_every_changed_byte_of_the_data_is_noticed(path, data):
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    position = data.draw(st.integers(8 + length, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged")
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its blake2b"):
        jlcm.load(damaged, model=small())


def test_unverified_damage_never_escapes_as_another_error(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    start = content.index(b'"jlcm"')
    end = content.index(b"}}", start)
    damaged = path.with_name("damaged")
    for position in range(start, end):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 5)
        damaged.write_bytes(flipped)
        for read in (
            lambda: jlcm.load(damaged, model=small(), verify=False),
            lambda: jlcm.footprint(damaged),
        ):
            try:
                read()
            except CheckpointError:
                pass


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.9, 0.9999])
def test_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (lambda: jlcm.load(path, model=small()), lambda: jlcm.footprint(path)):
        with pytest.raises(CheckpointError, match="truncated"):
            read()
    with pytest.raises(CheckpointError, match="not a packed file"):
        read_header(path)


def test_appended_bytes(path):
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError):
        jlcm.load(path, model=small())


def test_other_format_version(path):
    def newer(header, tensors):
        header["format_version"] = 2

    with pytest.raises(CheckpointError, match="format version 2, this jlcm reads version 1"):
        jlcm.load(rewrite(path, newer), model=small())


def test_files_of_others(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"0.weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="not one that jlcm.save wrote"):
        jlcm.load(foreign, model=small())
    save_file({"0.weight": torch.zeros(3)}, foreign, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not one that jlcm.save wrote"):
        jlcm.footprint(foreign)
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="truncated or not a packed file"):
        jlcm.load(tmp_path / "model.pt", model=small())


def test_missing_file(tmp_path):
    for read in (jlcm.load, jlcm.footprint, read_tensors):
        with pytest.raises(CheckpointError, match="none.safetensors: no such file"):
            read(tmp_path / "none.safetensors")
        with pytest.raises(CheckpointError, match="has no config.json"):
            read(tmp_path)
    with pytest.raises(CheckpointError, match="none.safetensors"):
        read_header(tmp_path / "none.safetensors")


# Architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9)), "2.* has shape"),
        (lambda: nn.Sequential(nn.Linear(12, 16)), "no layer for 2.bias, 2.weight"),
        (
            lambda: nn.Sequential(*small(), nn.Linear(8, 8)),
            "the file has no values for 3.weight, 3.bias",
        ),
        (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.ReLU()), "no attribute"),
        (lambda: nn.Linear(12, 16), "no layer for"),
        (lambda: nn.Sequential(*small(), nn.BatchNorm1d(8)), "the file has no values for 3"),
        (
            lambda: nn.Sequential(*small(), nn.BatchNorm1d(8, affine=False)),
            "the file has no values for 3",
        ),
    ],
)
def test_architecture_that_does_not_fit(path, model, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        jlcm.load(path, model=model())
    assert str(path) in str(caught.value)


def test_packed_models_are_not_filled_again(packed, path):
    with pytest.raises(CheckpointError, match="already has an attribute"):
        jlcm.load(path, model=copy.deepcopy(packed))


def test_no_architecture_in_the_file(path):
    with pytest.raises(CheckpointError, match="names no architecture, pass jlcm.load"):
        jlcm.load(path)


@pytest.mark.parametrize("builder", ["resnet18", "a:b:c", ":f", ""])
def test_malformed_builders(builder):
    with pytest.raises(ValueError, match="not of the form 'module:function'"):
        Architecture(builder=builder)


@pytest.mark.parametrize(
    "builder", ["os:system", "torch.hub:load", "timmy:f", "torchvision.datasets.utils:download_url"]
)
def test_untrusted_builders(builder, path):
    with pytest.raises(ValueError, match="build the model yourself"):
        Architecture(builder=builder)

    def forge(header, tensors):
        header["architecture"] = {"builder": builder, "arguments": {}}

    with pytest.raises(CheckpointError, match="build the model yourself"):
        jlcm.load(rewrite(path, forge))


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("torchvision.models.resnet:partial", {}),
        ("torchvision.models.resnet:torch", {}),
        ("timm.models.resnet:build_model_with_cfg", {}),
    ],
)
def test_functions_that_a_trusted_package_merely_imports(builder, arguments, path):
    def forge(header, tensors):
        header["architecture"] = {"builder": builder, "arguments": arguments}

    with pytest.raises(CheckpointError, match="cannot build its architecture"):
        jlcm.load(rewrite(path, forge))


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("torchvision.models:no_such_network", {}),
        ("torchvision.no_such_module:resnet18", {}),
        ("torchvision.models:resnet18", {"classes_of": 3}),
    ],
)
def test_builders_that_fail(builder, arguments, path):
    def forge(header, tensors):
        header["architecture"] = {"builder": builder, "arguments": arguments}

    with pytest.raises(CheckpointError, match="cannot build its architecture"):
        jlcm.load(rewrite(path, forge))


@pytest.mark.parametrize("value", [{1, 2}, (1, 2), torch.float32, {3: 4}, float("nan"), object()])
def test_arguments_are_json(value):
    with pytest.raises(ValueError, match="not plain JSON"):
        Architecture(builder="timm:create_model", arguments={"value": value})


def _parts(header, tensors):
    del tensors["0.weight.codebooks"]


def _bits(header, tensors):
    header["tensors"]["0.weight"]["bits"] = 7


def _dtype(header, tensors):
    header["dtype"] = "load"


def _same_as(header, tensors):
    header["tensors"]["9.weight"] = {"same_as": "0.weight"}


def _compression(header, tensors):
    header["compression"]["surprise"] = 1


@pytest.mark.parametrize("change", [_parts, _bits, _dtype, _same_as, _compression])
def test_forged_descriptions(path, change):
    with pytest.raises(CheckpointError, match="does not fit"):
        jlcm.load(rewrite(path, change), model=small())
