"""RED++ hashing against an independent kernel density estimate."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.methods.network import Network
from jlcm.methods.redpp import RedPP, find_modes, redpp
from jlcm.packed import PackedWeight


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mixture(centres: list[float], width: float, count: int = 1000) -> Tensor:
    return torch.cat([c + width * randn(count, seed=i) for i, c in enumerate(centres)])


def hashed(weight: Tensor, bits: int, **options) -> PackedWeight:
    network = Network(
        nn.Module(), {"w": nn.Parameter(weight.float())}, {"w": bits}, 4.0, progress=False
    )
    return redpp(network, RedPP(**options))["w"]


def around(values: Tensor) -> np.ndarray:
    """Places from below the smallest to above the largest value."""
    margin = float(values.max() - values.min()) / 100
    return np.linspace(float(values.min()) - margin, float(values.max()) + margin, 8001)


def density(values: Tensor, bandwidth: float):
    """Scipy's, of the same bandwidth."""
    stats = pytest.importorskip("scipy.stats")
    return stats.gaussian_kde(values.numpy(), bw_method=bandwidth / float(values.std()))


def peaks(values: Tensor, bandwidth: float, sign: int = 1) -> np.ndarray:
    """Places of the maxima, or of the minima, of scipy's density."""
    at = around(values)
    found = sign * density(values, bandwidth)(at)
    inner = (found[1:-1] > found[:-2]) & (found[1:-1] > found[2:])
    return at[1:-1][inner]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_codewords_are_maxima_of_the_density(bits, seed):
    values = randn(300, seed=seed)
    modes = find_modes(values, 2**bits)
    assert 1 <= len(modes.maxima) <= 2**bits and len(modes.minima) == len(modes.maxima) - 1
    # No more than two places of the search and two bins away from those of scipy.
    near = 2 * float(values.max() - values.min()) * (1 / 7000 + 1 / 2**14)
    for places, sign in [(modes.maxima, 1), (modes.minima, -1)]:
        expected = peaks(values, modes.bandwidth, sign)
        assert (np.abs(places.numpy()[:, None] - expected).min(1) <= near).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_bandwidth_is_the_smallest(bits, seed):
    values = randn(300, seed=seed)
    bandwidth = find_modes(values, 2**bits).bandwidth
    assert len(peaks(values, 1.01 * bandwidth)) <= 2**bits < len(peaks(values, 0.99 * bandwidth))


def test_mixture_of_four_gives_its_centres():
    centres = [-2.0, -0.5, 0.25, 1.5]
    values = mixture(centres, 0.02)
    stored = hashed(values.view(40, 100), 2)
    assert torch.allclose(stored.codebooks[0].float(), torch.tensor(centres), atol=0.02)
    assert torch.equal(stored.unpack_codes().long(), torch.arange(4).repeat_interleave(1000))
    assert torch.allclose(
        stored().view(-1), torch.tensor(centres).repeat_interleave(1000), atol=0.02
    )


def test_weights_take_the_maximum_of_their_cell():
    values = randn(40, 25)
    modes = find_modes(values.view(-1), 8)
    stored = hashed(values, 3)
    cells = (values.float().double().view(-1, 1) > modes.minima).sum(1)
    assert torch.equal(stored().view(-1), modes.maxima.half().float()[cells])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=200),
    st.integers(1, 4),
)
def test_any_weights_are_hashed(values, bits):
    weight = torch.tensor(values)[None]
    modes = find_modes(weight.double().view(-1), 2**bits)
    assert 1 <= len(modes.maxima) <= 2**bits and len(modes.minima) == len(modes.maxima) - 1
    both = torch.stack([modes.maxima[:-1], modes.minima, modes.maxima[1:]])
    assert (both.diff(dim=0) > 0).all()
    stored = hashed(weight, bits)
    assert stored().isfinite().all()
    low, high = weight.min() - 0.5, weight.max() + 0.5  # half a unit of float16 below 1024
    assert low <= stored().min() and stored().max() <= high


@pytest.mark.parametrize("value", [0.0, -0.75, 1e-30])
def test_equal_weights_have_one_codeword(value):
    weight = torch.full((4, 6), value)
    stored = hashed(weight, 3)
    assert stored.codebooks.shape == (1, 1)
    assert torch.equal(stored(), weight.half().float())
    assert find_modes(weight.double().view(-1), 8).bandwidth == 0


def test_few_distinct_weights_are_kept():
    levels = torch.tensor([-1.0, -0.25, 0.5, 0.75, 3.0])
    weight = levels[torch.arange(60).view(6, 10) % 5]
    stored = hashed(weight, 3)
    assert stored.codebooks.shape == (1, 5)
    assert torch.allclose(stored(), weight, atol=4 / 2**14)


def test_uniform_density_has_no_maxima_of_rounding_errors():
    values = torch.linspace(-1, 1, 2**15, dtype=torch.float64)
    modes = find_modes(values, 1)
    assert len(modes.maxima) == 1 and modes.bandwidth < 0.01
    assert abs(float(modes.maxima)) < 0.01


def test_one_distant_weight_has_a_cell_of_its_own():
    values = torch.cat([randn(10**5) * 0.01, torch.tensor([5.0])])
    modes = find_modes(values, 2)
    assert modes.maxima[1] == pytest.approx(5.0, abs=1e-3)


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_networks_are_hashed_without_folding(networks, name, tmp_path):
    model, x = networks[name]
    packed = jlcm.quantize(model, "redpp", bits=8, progress=False)
    expected = model(x)
    assert (packed(x) - expected).norm() <= 0.1 * expected.norm()
    held = [s for _, s in stored_tensors(packed) if isinstance(s, PackedWeight)]
    assert all(s.codebooks.shape[0] == 1 and s.scales is None for s in held)
    norms = [m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(len(list(norm.buffers())) for norm in norms)
    assert any("hashing" in note for note in packed.compression.notes)
    path = jlcm.save(packed, tmp_path / "m")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(x), packed(x))
    assert jlcm.footprint(path).codebooks == sum(2 * s.codebooks.numel() for s in held)


def test_options_out_of_range():
    with pytest.raises(Invalid):
        RedPP(bins=1)
    assert hashed(randn(4, 5), 2, bins=7).codebooks.shape[1] <= 4
