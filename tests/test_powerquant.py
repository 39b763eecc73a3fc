"""PowerQuant: its grid, its exponent, and that eight bits change little."""

import math

import pytest
import torch
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.methods.network import Network
from jlcm.methods.powerquant import (
    PowerQuant,
    Sample,
    distortion,
    encode,
    find_exponent,
    golden_section,
    powerquant,
)
from jlcm.uniform import UniformWeight


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laplace(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-1.999 * uniform.abs())


def network(*weights: Tensor, bits: int = 4) -> Network:
    names = [str(i) for i in range(len(weights))]
    parameters = dict(zip(names, map(nn.Parameter, weights), strict=True))
    return Network(nn.Module(), parameters, dict.fromkeys(names, bits), 4.0, progress=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exponent_of_one_is_symmetric_rounding(bits):
    weight = randn(7, 3, 5)
    stored = encode(weight, bits, 1.0)
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax((1, 2)) * ((most + 1) / most)).half().float()
    step = scales[:, None, None] / (most + 1)
    expected = (weight / step).round().clamp(-most, most)
    assert torch.equal(stored.unpack_codes().view(7, 3, 5).float() - most - 1, expected)
    assert torch.allclose(stored(), expected * step, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.1, 0.37, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_codes_are_nearest_on_the_stored_grid(exponent, bits):
    """The power of a weight is rounded to the nearest level, as scale and exponent are stored."""
    weight = randn(6, 40) * torch.logspace(-3, 1, 6)[:, None]
    stored = encode(weight, bits, exponent)
    half, power = 2 ** (bits - 1), float(stored.power.double())
    assert power == float(torch.tensor(exponent).half())
    place = (weight.double().abs() / stored.scales.double()[:, None]) ** power * half
    levels = torch.arange(half)
    expected = (place[..., None] - levels).abs().argmin(-1) * weight.sign()
    codes = stored.unpack_codes().view(6, 40).double() - half
    # A place half-way between levels may fall to either side in single precision.
    clear = (place - place.floor() - 0.5).abs() > 1e-4
    assert torch.equal(codes[clear], expected.double()[clear])
    assert codes.abs().max() == half - 1


def test_largest_magnitude_is_a_level():
    weight = randn(5, 30)
    for exponent in (0.3, 0.7):
        error = (encode(weight, 4, exponent)() - weight).abs()
        largest = weight.abs().argmax(1, keepdim=True)
        assert (error / weight.abs()).gather(1, largest).max() < 2e-3


def test_zeros_and_tiny_rows():
    weight = torch.zeros(3, 8)
    weight[1], weight[2, 0] = 1e-9, -2.0
    stored = encode(weight, 3, 0.5)
    assert torch.equal(stored()[:2], torch.zeros(2, 8))
    assert torch.allclose(stored()[2], weight[2], rtol=1e-3)
    assert torch.isfinite(encode(torch.full((2, 4), 6e4), 2, 0.1)()).all()


@pytest.mark.parametrize("minimum", [0.1, 0.123, 0.5, 0.77, 1.0])
def test_golden_section_finds_a_minimum(minimum):
    calls = []

    def function(x: float) -> float:
        calls.append(x)
        return abs(x - minimum) ** 1.5

    assert golden_section(function, 0.1, 1.0, 0.01) == pytest.approx(minimum, abs=0.01)
    assert len(calls) <= 12 and all(0.1 < x < 1 for x in calls)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("draw", [randn, laplace])
def test_exponent_is_as_good_as_that_of_a_grid_search(draw, bits):
    samples = [Sample(draw(64, 80, seed=seed), bits, 1.0) for seed in range(3)]

    def harm(exponent: float) -> float:
        return sum(distortion(sample, exponent) for sample in samples)

    best = min(harm(0.1 + 0.01 * i) for i in range(91))
    assert harm(find_exponent(samples, 0.01)) <= 1.005 * best


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_distortion_is_that_of_the_decoded_weight(exponent):
    weight = laplace(400, 50)
    exact = float((encode(weight, 4, exponent)() - weight).norm())
    assert distortion(Sample(weight, 4, 1.0), exponent) == pytest.approx(exact, rel=1e-5)
    part = distortion(Sample(weight[::4], 4, 0.25), exponent)
    assert part == pytest.approx(exact, rel=0.1)


def test_one_exponent_for_the_network_or_one_for_each_layer():
    weights = laplace(40, 60), torch.rand(40, 60) - 0.5
    one, other = (
        powerquant(network(*weights), PowerQuant(per_layer=choice)) for choice in (False, True)
    )
    assert one["0"].power == one["1"].power
    assert other["0"].power < one["0"].power < other["1"].power

    def error(stored: UniformWeight, weight: Tensor) -> float:
        return float((stored() - weight).norm())

    for name, weight in zip("01", weights, strict=True):
        assert error(other[name], weight) < error(one[name], weight)


def test_search_looks_at_some_rows_and_all_are_encoded():
    weight = laplace(64, 50)
    options = PowerQuant(sample=500)
    few = network(weight)
    stored = powerquant(few, options)["0"]
    assert (
        stored.power == powerquant(network(weight[torch.arange(10) * 64 // 10]), options)["0"].power
    )
    assert torch.equal(stored(), encode(weight, 4, float(stored.power))())
    assert any("at most 500 weights" in note for note in few.notes)
    everything = network(weight)
    powerquant(everything, PowerQuant())
    assert len(everything.notes) == 1 and "golden section" in everything.notes[0]
    assert powerquant(network(weight), PowerQuant(sample=1))["0"].shape == (64, 50)


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_eight_bits_keep_the_outputs(networks, name):
    model, x = networks[name]
    packed = jlcm.quantize(model, "powerquant", bits=8, progress=False)
    expected = model(x)
    assert (packed(x) - expected).norm() <= 0.02 * expected.norm()
    grids = [held for _, held in stored_tensors(packed) if isinstance(held, UniformWeight)]
    assert len({float(held.power) for held in grids}) == 1
    assert all(held.zeros is None and held.scales.numel() == held.rows for held in grids)


def test_a_power_is_better_than_none_where_weights_are_peaked():
    weight = laplace(50, 80)
    stored = powerquant(network(weight), PowerQuant())["0"]
    uniform = encode(weight, 4, 1.0)
    assert (stored() - weight).norm() < 0.85 * (uniform() - weight).norm()
    assert math.isclose(float(stored.power), 0.5, abs_tol=0.25)


def test_codes_of_one_bit_are_refused(mlp):
    with pytest.raises(Invalid, match="at least 2 bits"):
        jlcm.quantize(mlp, "powerquant", alpha=16, progress=False)


@pytest.mark.parametrize(
    "options", [{"per_layer": "yes"}, {"tolerance": 0}, {"tolerance": 0.9}, {"sample": 0}]
)
def test_options_out_of_range(options):
    with pytest.raises(Invalid):
        PowerQuant(**options)


def test_no_weight_beside_the_ends():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    packed = jlcm.quantize(model, "powerquant", first_last="int8", progress=False)
    assert not any(isinstance(held, UniformWeight) for _, held in stored_tensors(packed))
