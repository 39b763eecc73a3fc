"""Weights as sums: parts that do not fit, files and their bytes."""

import copy
import os

import pytest
import torch
from test_checkpoint_damage import rewrite
from test_expanded import uniform
from test_footprint import header_bytes, tensor_bytes
from torch import Tensor

import jlcm
from jlcm.expanded import ExpandedWeight, expand
from jlcm.layers import stored_tensors
from jlcm.methods.rex import REx
from jlcm.packed import StoredWeight
from jlcm.packing import pack_integers
from jlcm.reading import CheckpointError
from jlcm.uniform import UniformWeight


def masks(*rows: int) -> Tensor:
    return torch.tensor([[row] for row in rows], dtype=torch.uint8)


def ones(count: int) -> Tensor:
    return torch.ones(count).half()


WRONG = {
    "masks without terms": {"masks": masks(7)},
    "terms without masks": {"terms": [uniform(3)]},
    "mask of other rows": {"terms": [uniform(3)], "masks": masks(3)},
    "mask of no row": {"terms": [uniform(1)], "masks": masks(0)},
    "mask that is too long": {"terms": [uniform(3)], "masks": torch.tensor([[7, 0]]).byte()},
    "flat mask": {"terms": [uniform(3)], "masks": torch.tensor([7]).byte()},
    "mask of another type": {"terms": [uniform(3)], "masks": torch.tensor([[7.0]]).half()},
    "gaps alone": {"gaps": pack_integers(torch.tensor([3]), 4), "gap_bits": 4},
    "values alone": {"values": ones(2), "gap_bits": 4},
    "too few gaps": {"gaps": torch.zeros(1).byte(), "values": ones(3), "gap_bits": 4},
    "position past the end": {
        "gaps": pack_integers(torch.tensor([100, 19]), 7),
        "values": ones(2),
        "gap_bits": 7,
    },
    "gaps without bits": {"gaps": torch.zeros(0).byte(), "values": ones(3), "gap_bits": 0},
    "gaps of too many bits": {"gaps": torch.zeros(8).byte(), "values": ones(1), "gap_bits": 64},
    "values of another type": {"gaps": masks(0)[0], "values": torch.ones(1), "gap_bits": 4},
    "values in two dimensions": {"gaps": masks(0)[0], "values": ones(1)[None], "gap_bits": 4},
}


@pytest.mark.parametrize("parts", WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ValueError):
        ExpandedWeight(uniform(), **parts)


def test_term_of_another_width_is_refused():
    term = UniformWeight.encode(torch.zeros(6 * 4), torch.zeros(6), shape=(6, 4), bits=3)
    with pytest.raises(ValueError, match=r"a term of shape \(6, 4\) for 6 rows"):
        expand(uniform(), terms=[(torch.ones(6).bool(), term)])


@pytest.mark.parametrize("positions", [[5, 5], [7, 3], [-1, 4], [3, 120]])
def test_positions_must_ascend_inside_the_weight(positions):
    with pytest.raises(ValueError):
        expand(uniform(), positions=torch.tensor(positions), differences=torch.ones(2))


@pytest.mark.parametrize("differences", [None, torch.ones(1), torch.ones(3)])
def test_each_outlier_needs_a_difference(differences):
    with pytest.raises(ValueError, match="one position and one difference"):
        expand(uniform(), positions=torch.tensor([1, 2]), differences=differences)


# Files -------------------------------------------------------------------------------------------

OPTIONS = {"alpha": 3.0, "options": REx(outliers=0.05, orders=3), "progress": False}


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_networks_come_back_bit_by_bit(networks, name, tmp_path):
    model, x = networks[name]
    packed = jlcm.quantize(model, "rex", **OPTIONS)
    assert any(isinstance(held, ExpandedWeight) for _, held in stored_tensors(packed))
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(x), packed(x))
    assert jlcm.save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    half = jlcm.load(path, model=copy.deepcopy(model), dtype=torch.bfloat16)
    for (_, one), (_, other) in zip(stored_tensors(half), stored_tensors(packed), strict=True):
        if isinstance(one, StoredWeight):
            assert torch.equal(one(), other().bfloat16())
    resaved = jlcm.load(jlcm.save(half, tmp_path / "half"), model=copy.deepcopy(model))
    assert torch.equal(resaved(x.bfloat16()), half(x.bfloat16()))


def test_every_byte_is_accounted_for(cnn, tmp_path):
    packed = jlcm.quantize(cnn, "rex", **OPTIONS)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    sizes = tensor_bytes(path)

    def total(*suffixes: str) -> int:
        return sum(size for key, size in sizes.items() if key.endswith(suffixes))

    for footprint in (jlcm.footprint(packed), jlcm.footprint(path)):
        assert footprint.codes == total(".codes") > 0
        assert footprint.scales == total(".scales") > 0
        assert footprint.orders == total(".masks") > 0
        assert footprint.outliers == total(".gaps", ".values") > 0
        parts = footprint.codes + footprint.scales + footprint.orders + footprint.outliers
        assert footprint.payload == sum(sizes.values()) == footprint.other + parts
        assert sum(layer.nbytes for layer in footprint.layers) == parts
        assert footprint.alpha_layers == footprint.reference_layers / parts >= 3
    assert jlcm.footprint(path).file_bytes == os.path.getsize(path)
    assert os.path.getsize(path) == header_bytes(path) + sum(sizes.values())


def _no_base(layer, tensors):
    del layer["base"]


def _term_too_many(layer, tensors):
    layer["terms"].append(layer["terms"][0])


def _no_terms(layer, tensors):
    layer["terms"] = []


def _kind(layer, tensors):
    layer["kind"] = "product"


def _wide_gaps(layer, tensors):
    layer["gap_bits"] = 3000


def _cut_gaps(layer, tensors):
    tensors["gaps"] = tensors["gaps"][:-1]


def _no_values(layer, tensors):
    del tensors["values"]


def _stray_part(layer, tensors):
    tensors["surprise"] = tensors["gaps"].clone()


CHANGES = [
    _no_base,
    _term_too_many,
    _no_terms,
    _kind,
    _wide_gaps,
    _cut_gaps,
    _no_values,
    _stray_part,
]


@pytest.mark.parametrize("change", CHANGES)
def test_forged_files_are_refused(mlp, tmp_path, change):
    packed = jlcm.quantize(mlp, "rex", **OPTIONS)
    names = [n for n, held in stored_tensors(packed) if getattr(held, "values", None) is not None]
    held = {n: s for n, s in stored_tensors(packed) if isinstance(s, ExpandedWeight) and s.terms}
    name = next(n for n in names if n in held)

    def forge(header, tensors):
        parts = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(name)}
        for part in parts:
            del tensors[f"{name}.{part}"]
        change(header["tensors"][name], parts)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})

    path = rewrite(jlcm.save(packed, tmp_path / "m"), forge)
    for read in (jlcm.footprint, lambda p: jlcm.load(p, model=copy.deepcopy(mlp))):
        with pytest.raises(CheckpointError):
            read(path)
