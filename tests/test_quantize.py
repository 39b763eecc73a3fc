"""What every compared method has in common: bytes, files, ends, errors."""

import copy
import os

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jlcm
from jlcm.layers import stored_tensors
from jlcm.methods.adaround import AdaRound
from jlcm.methods.brecq import Brecq
from jlcm.methods.dkm import DKM
from jlcm.methods.nupes import Nupes
from jlcm.methods.rtn import RTN
from jlcm.packed import StoredWeight
from jlcm.quantize import METHODS

#: Short runs, where the defaults take long.
SHORT = {
    "adaround": AdaRound(iterations=100, lr=0.05),
    "brecq": Brecq(iterations=60, lr=0.05),
    "nupes": Nupes(iterations=100, lr=0.05),
    "dkm": DKM(epochs=2),
}
#: Methods whose 8-bit grids leave next to nothing of the error.
UNIFORM = (
    "rtn", "dfq", "squant", "powerquant", "rex", "adaround", "brecq", "nupes", "optq", "awq",
    "llm_int8",
)  # fmt: skip


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 48, 1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    randomise(model)
    return model.eval()


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (8, 8), mode="bilinear")


def quantize(model, method, **options):
    given = {"calibration": images(64, 1), "progress": False, "options": SHORT.get(method)}
    return jlcm.quantize(model, method, **given | options)


@torch.no_grad()
def distance(packed, model) -> float:
    x = images(64, 2)
    return float((packed(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_last", ["same", "int8"])
def test_file_holds_what_runs_and_every_byte_is_counted(method, first_last, tmp_path):
    packed = quantize(network(), method, alpha=4.0, first_last=first_last)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    loaded = jlcm.load(path, model=network(1))
    x = images(8, 3)
    assert torch.equal(loaded(x), packed(x))
    size, memory = jlcm.footprint(path), jlcm.footprint(packed)
    assert size.file_bytes == os.path.getsize(path) == size.header + size.payload
    assert size.payload == memory.payload
    parts = size.codes + size.codebooks + size.scales + size.orders + size.outliers
    assert parts + size.other == size.payload
    assert sum(layer.nbytes for layer in size.layers) == parts
    held = sum(b.numel() * b.element_size() for b in loaded.buffers())
    assert held == size.payload
    assert loaded.compression.notes == packed.compression.notes
    assert packed.compression.options["method"] == method
    weights = {n: s for n, s in stored_tensors(loaded) if isinstance(s, StoredWeight)}
    assert len(weights) == 4
    if first_last == "int8":
        assert [weights[n].bits for n in ("0.weight", "11.weight")] == [8, 8]


@pytest.mark.parametrize("method", UNIFORM)
def test_eight_bits_keep_the_function(method):
    assert distance(quantize(network(), method, bits=8), network()) < 0.02


@pytest.mark.parametrize("method", [m for m in METHODS if m != "llm_int8"])
def test_more_bits_are_closer(method):
    errors = [distance(quantize(network(), method, bits=bits), network()) for bits in (2, 5)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "llm_int8"])
def test_bits_follow_from_alpha_or_are_given(method):
    for options, bits in (({"alpha": 5.33}, 3), ({"bits": 4}, 4)):
        packed = quantize(network(), method, **options)
        found = [s.bits for _, s in stored_tensors(packed) if isinstance(s, StoredWeight)]
        # REx splits the bits into terms; small layers of LNQ give bits up for codebooks.
        assert max(found) == (bits - 1 if method == "rex" and bits == 3 else bits)


@pytest.mark.parametrize("method", METHODS)
def test_relative_errors_and_notes_are_recorded(method):
    model = network()
    packed = quantize(model, method)
    notes = packed.compression.notes
    assert len(notes) == len(set(notes)) and all(isinstance(note, str) for note in notes)
    for layer in jlcm.footprint(packed).layers:
        error = layer.relative_error
        assert error != error or 0 <= error < 1.5


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].needs_inputs])
def test_methods_without_data_need_none(method):
    packed = jlcm.quantize(network(), method, progress=False)
    again = quantize(network(), method)
    assert torch.equal(packed(images(4, 5)), again(images(4, 5)))
    assert packed.learning == []


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].learn is not None])
def test_methods_that_learn_say_what_they_did(method):
    packed = quantize(network(), method)
    assert packed.learning


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].needs_inputs])
def test_methods_with_data_ask_for_it(method):
    with pytest.raises(ValueError, match="pass calibration="):
        jlcm.quantize(network(), method, progress=False)


def test_original_is_left_alone_unless_in_place():
    model = network()
    before = copy.deepcopy(model.state_dict())
    packed = jlcm.quantize(model, "dfq", progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not hasattr(model, "compression")
    same = jlcm.quantize(model, "dfq", inplace=True, progress=False)
    assert same is model and torch.equal(same(images(4, 5)), packed(images(4, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "squant"),
        ({"alpha": 0.5}, "above 1"),
        ({"bits": 9}, "between 1 and 8"),
        ({"bits": 0}, "between 1 and 8"),
        ({"first_last": "fp8"}, "int8"),
        ({"options": AdaRound()}, "RTN"),
        ({"filter_fn": lambda module, name: False}, "no layer selected"),
    ],
)
def test_bad_options_are_refused(options, message):
    given = {"method": "rtn", "progress": False} | options
    with pytest.raises(ValueError, match=message):
        jlcm.quantize(network(), **given)


def test_bad_networks_are_refused():
    packed = jlcm.quantize(network(), "rtn", progress=False)
    with pytest.raises(ValueError, match="already compressed"):
        jlcm.quantize(packed, "rtn")
    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight.*NaN"):
        jlcm.quantize(broken, "rtn")


def test_ranges_of_rtn():
    model = network()
    errors = {
        (kind, per_row): distance(
            quantize(model, "rtn", bits=4, options=RTN(range=kind, per_row=per_row)), model
        )
        for kind in ("search", "min_max")
        for per_row in (True, False)
    }
    assert errors["min_max", True] < errors["min_max", False]
    with pytest.raises(ValueError, match="min_max"):
        RTN(range="half")
    with pytest.raises(ValueError, match="true or false"):
        RTN(per_row=1)
