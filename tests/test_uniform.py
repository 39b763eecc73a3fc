"""Weights on uniform and power grids against a decoder written weight by weight."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_footprint import header_bytes, tensor_bytes
from test_packed import CASTS, check_cast
from torch import nn

import jlcm
from jlcm.layers import stored_tensors
from jlcm.methods.rtn import RTN
from jlcm.packed import nbytes
from jlcm.packing import pack, packed_bytes
from jlcm.uniform import UniformWeight


def decode(codes, scales, shape, bits, *, zeros=None, power=None, group=None) -> torch.Tensor:
    """scale * sign(g) * |g|^(1 / power), one weight after the other, in double precision."""
    columns, half = codes.numel() // shape[0], 2 ** (bits - 1)
    power = 1.0 if power is None else float(torch.tensor(power).half())
    decoded = []
    for p, code in enumerate(codes.tolist()):
        place = p // columns if len(scales) > 1 else 0
        if group is not None:
            place = p // columns * -(-columns // group) + p % columns // group
        g = (code - (half if zeros is None else int(zeros[place]))) / half
        magnitude = abs(g) ** (1 / power)
        decoded.append(float(scales[place].half()) * (magnitude if g > 0 else -magnitude))
    return torch.tensor(decoded, dtype=torch.float64).view(shape)


@st.composite
def parts(draw) -> dict:
    rows, columns, bits = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    group = draw(st.none() | st.integers(1, columns - 1)) if columns > 1 else None
    count = draw(st.sampled_from([1, rows])) if group is None else rows * -(-columns // group)
    scales = torch.rand(count, generator=generator)
    zeros = torch.randint(2**bits, scales.shape, generator=generator)
    return {
        "codes": torch.randint(2**bits, (rows * columns,), generator=generator),
        "scales": scales,
        "shape": draw(
            st.sampled_from([(rows, columns), (rows, columns, 1, 1), (rows, 1, columns)])
        ),
        "bits": bits,
        "zeros": zeros if draw(st.booleans()) else None,
        "power": draw(st.none() | st.floats(0.1, 2)),
        "group": group,
    }


def example(**changes) -> UniformWeight:
    generator = torch.Generator().manual_seed(0)
    options = {
        "codes": torch.randint(8, (6, 20), generator=generator),
        "scales": torch.rand(6, generator=generator),
        "shape": (6, 5, 2, 2),
        "bits": 3,
        "zeros": torch.randint(8, (6,), generator=generator),
        "power": 0.5,
    }
    return UniformWeight.encode(**{**options, **changes})


@settings(deadline=None, max_examples=120)
@given(parts())
def test_decodes_as_the_formula_says(options):
    stored = UniformWeight.encode(**options)
    decoded = stored()
    assert decoded.dtype == torch.float32 and decoded.shape == options["shape"]
    expected = decode(**options)
    if options["power"] is None:
        assert torch.equal(decoded, expected.float())  # every step is exact in float32
    else:
        assert torch.allclose(decoded.double(), expected, rtol=1e-5, atol=1e-12)
    assert torch.equal(stored.unpack_codes().long(), options["codes"])
    if options["zeros"] is not None:
        assert torch.equal(stored.zero_points().long(), options["zeros"])
    sizes = stored.sizes()
    assert sum(sizes.values()) == sum(nbytes(buffer) for buffer in stored.buffers())
    assert sizes["codes"] == packed_bytes(stored.count, stored.bits)
    assert stored.groups() == (0, len(options["scales"]))


@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_the_decoding_dtype_and_no_stored_byte(cast):
    check_cast(example(), cast)


def test_copy_and_state_dict_round_trip():
    stored = example()
    twin = copy.deepcopy(stored)
    assert torch.equal(twin(), stored())
    other = example(codes=torch.zeros(120, dtype=torch.int64), power=0.9)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other(), stored())
    twin.scales.zero_()
    assert stored().abs().sum() > 0
    stored().zero_()
    assert stored().abs().sum() > 0


WRONG = {
    "code too large": {"codes": torch.full((120,), 8)},
    "negative code": {"codes": torch.full((120,), -1)},
    "too few codes": {"codes": torch.zeros(100, dtype=torch.int64)},
    "scales for some rows": {"scales": torch.zeros(5), "zeros": None},
    "no scale": {"scales": torch.zeros(0), "zeros": None},
    "zero point too large": {"zeros": torch.full((6,), 8)},
    "zero points for some rows": {"zeros": torch.zeros(2, dtype=torch.int64)},
    "power of zero": {"power": 0.0},
    "power that float16 rounds to zero": {"power": 1e-9},
    "negative power": {"power": -0.5},
    "no number": {"power": float("nan")},
    "scales for rows, not groups": {"group": 5},
    "scales for other groups": {"group": 5, "scales": torch.zeros(12), "zeros": None},
    "groups of no column": {"group": 0},
    "groups of whole rows": {"group": 20},
    "groups of parts of columns": {"group": 5.0},
    "groups of a bool": {"group": True, "scales": torch.zeros(120), "zeros": None},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError):
        example(**changes)


def test_missing_parts_are_refused():
    codes = pack(torch.zeros(4).int(), 1)
    sizes = {"shape": (2, 2), "bits": 1}
    with pytest.raises(ValueError, match="codes and scales"):
        UniformWeight(**sizes, codes=None, scales=torch.zeros(2).half())
    with pytest.raises(ValueError, match="codes and scales"):
        UniformWeight(**sizes, codes=codes, scales=None)
    with pytest.raises(ValueError, match="2 powers for one grid"):
        power = torch.ones(2).half()
        UniformWeight(**sizes, codes=codes, scales=torch.zeros(2).half(), power=power)


METHODS = {
    "rtn": ("rtn", None),
    "one grid": ("rtn", RTN(per_row=False, range="min_max")),
    "groups": ("rtn", RTN(group=7)),
    "power": ("powerquant", None),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_networks_come_back_bit_by_bit(networks, name, method, tmp_path):
    model, x = networks[name]
    method, options = METHODS[method]
    packed = jlcm.quantize(model, method, options=options, progress=False).bfloat16().float()
    assert any(isinstance(held, UniformWeight) for _, held in stored_tensors(packed))
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(x), packed(x))
    assert jlcm.save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    half = jlcm.load(path, model=copy.deepcopy(model), dtype=torch.float16)
    assert half(x.half()).dtype == torch.float16


@pytest.mark.parametrize("method", METHODS)
def test_every_byte_is_accounted_for(cnn, method, tmp_path):
    method, options = METHODS[method]
    packed = jlcm.quantize(cnn, method, options=options, progress=False)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    sizes = tensor_bytes(path)

    def total(*suffixes: str) -> int:
        return sum(size for key, size in sizes.items() if key.endswith(suffixes))

    for footprint in (jlcm.footprint(packed), jlcm.footprint(path)):
        assert footprint.codes == total(".codes") > 0
        assert footprint.scales == total(".scales", ".zeros", ".power") > 0
        assert footprint.codebooks == footprint.orders == footprint.outliers == 0
        assert footprint.payload == sum(sizes.values())
        parts = footprint.codes + footprint.scales
        assert footprint.other == footprint.payload - parts
        assert footprint.alpha_layers == footprint.reference_layers / parts
    assert jlcm.footprint(path).file_bytes == os.path.getsize(path)
    assert os.path.getsize(path) == header_bytes(path) + sum(sizes.values())


def test_tied_weights_are_stored_once(mlp, tmp_path):
    model = copy.deepcopy(mlp)
    model.append(nn.Linear(24, 48))
    model[-1].weight = model[0].weight
    packed = jlcm.quantize(model, "powerquant", progress=False)
    path = jlcm.save(packed, tmp_path / "m")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert again[0].packed["weight"] is again[5].packed["weight"]
