"""SqueezeLLM: weighted rows, weights kept apart, bytes."""

import copy

import pytest
import torch
from conftest import build
from test_scalings import llama, tokens
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.expanded import ExpandedWeight, outlier_bytes
from jlcm.layers import stored_tensors
from jlcm.methods.rtn import RTN, rounded
from jlcm.methods.squeezellm import SqueezeLLM, dense_and_sparse, kept_apart
from jlcm.packed import PackedWeight, StoredWeight
from jlcm.packing import packed_bytes
from jlcm.sensitivity import fisher_information

DENSE = SqueezeLLM(sparse=False)


def heavy_tailed(rows: int = 24, columns: int = 200) -> tuple[Tensor, Tensor]:
    """A weight with a few large values, and information that varies over magnitudes."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    weight.view(-1)[::301] *= 12
    return weight, torch.randn(rows, columns, generator=generator).mul(2).exp() * 1e-7


def weighted(decoded: Tensor, weight: Tensor, fisher: Tensor) -> float:
    return float((fisher.double() * (decoded - weight).double().square()).sum())


def network() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 10)))


def inputs(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 48, generator=generator) * torch.linspace(0.1, 3, 48)


def quantize(model: nn.Module, bits: int = 3, **options) -> nn.Module:
    given = {"options": SqueezeLLM(**options), "calibration": inputs(), "progress": False}
    return jlcm.quantize(model, "squeezellm", bits=bits, **given)


def weights_of(packed: nn.Module) -> dict[str, StoredWeight]:
    return {n: held for n, held in stored_tensors(packed) if isinstance(held, StoredWeight)}


def test_rows_are_clustered_as_well_as_possible():
    """Against weighted Lloyd iterations from the codebook that was found, and from quantiles."""
    weight, fisher = heavy_tailed(rows=4)
    held = dense_and_sparse(weight, fisher, 2, DENSE)
    assert held.codebooks.shape == (4, 4)
    for row, cost, found in zip(weight.double(), fisher.double(), held().double(), strict=True):
        for start in (found.unique(), row.quantile(torch.tensor([0.1, 0.4, 0.6, 0.9]).double())):
            codebook = start
            for _ in range(100):
                codes = (row[:, None] - codebook).abs().argmin(1)
                masses = torch.zeros_like(codebook).index_add(0, codes, cost)
                sums = torch.zeros_like(codebook).index_add(0, codes, cost * row)
                codebook = torch.where(masses > 0, sums / masses, codebook)
            lloyd = (cost * (row - codebook[codes]).square()).sum()
            assert (cost * (row - found).square()).sum() <= 1.001 * lloyd


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weighted_error_is_below_that_of_rounding(bits):
    weight, fisher = heavy_tailed()
    grid = weighted(rounded(weight, bits, RTN())(), weight, fisher)
    dense = weighted(dense_and_sparse(weight, fisher, bits, DENSE)(), weight, fisher)
    plain = dense_and_sparse(weight, torch.ones_like(fisher), bits, DENSE)()
    sparse = weighted(dense_and_sparse(weight, fisher, bits, SqueezeLLM())(), weight, fisher)
    assert sparse < dense < weighted(plain, weight, fisher) < grid
    assert sparse < 0.5 * grid


def test_outliers_are_those_beyond_the_quartiles():
    weight, fisher = heavy_tailed()
    first, third = (float(weight.quantile(part)) for part in (0.25, 0.75))
    reach = 1.8 * (third - first)
    beyond = (weight < first - reach) | (weight > third + reach)
    assert 0.001 < beyond.float().mean() < 0.01
    assert torch.equal(kept_apart(weight, fisher, SqueezeLLM(sensitive=0)), beyond)
    assert not kept_apart(weight, fisher, SqueezeLLM(sensitive=0, outlier_range=100)).any()
    sensitive = kept_apart(weight, fisher, SqueezeLLM(sensitive=0.005, outlier_range=100))
    assert sensitive.sum() == 24 and fisher[sensitive].min() > fisher[~sensitive].max()
    assert not kept_apart(torch.zeros(3, 5), torch.zeros(3, 5), SqueezeLLM()).any()


def test_weights_kept_apart_are_exact_and_do_not_move_the_codebooks():
    weight, fisher = heavy_tailed()
    held = dense_and_sparse(weight, fisher, 3, SqueezeLLM())
    apart = kept_apart(weight, fisher, SqueezeLLM())
    assert isinstance(held, ExpandedWeight) and held.base.bits == 3
    torch.testing.assert_close(held()[apart], weight[apart], rtol=2e-3, atol=0)
    changed = torch.where(apart, 100 * weight, weight)
    again = dense_and_sparse(changed, fisher, 3, SqueezeLLM())
    assert torch.equal(again.base.codebooks, held.base.codebooks)
    assert torch.equal(again()[~apart], held()[~apart])
    assert held.sizes() == {
        "codes": packed_bytes(weight.numel(), 3),
        "codebooks": 24 * 8 * 2,
        "scales": 0,
        "orders": 0,
        "outliers": outlier_bytes(apart.view(-1).nonzero().view(-1)),
    }


def test_a_convolution_is_clustered_by_output_channel():
    weight, fisher = heavy_tailed()
    shaped = (w.view(24, 8, 5, 5) for w in (weight, fisher))
    held = dense_and_sparse(*shaped, 3, SqueezeLLM())
    assert held.shape == (24, 8, 5, 5)
    assert torch.equal(held().view(24, 200), dense_and_sparse(weight, fisher, 3, SqueezeLLM())())


def test_network_lowers_its_own_objective(tmp_path):
    model = network()
    packed = quantize(model)
    fisher = fisher_information(
        model, {n: model.get_parameter(n) for n in weights_of(packed)}, inputs(), progress=False
    )
    for name, held in weights_of(packed).items():
        weight = model.get_parameter(name).detach()
        grid = weighted(rounded(weight, 3, RTN())(), weight, fisher[name])
        assert weighted(held(), weight, fisher[name]) < 0.7 * grid
        error = (held() - weight).norm() / weight.norm()
        assert held.relative_error == pytest.approx(float(error), rel=1e-4)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again, x = jlcm.load(path, model=copy.deepcopy(model)), inputs(5)
    assert torch.equal(again(x), packed(x))
    assert jlcm.footprint(path).outliers > 0
    assert any("more bytes than alpha=5.33" in note for note in packed.compression.notes)


def test_without_sparse_weights_rows_have_codebooks_alone():
    packed = quantize(network(), sparse=False)
    for held in weights_of(packed).values():
        assert isinstance(held, PackedWeight) and held.codebooks.shape == (held.rows, 8)
    assert not any("sparse" in note for note in packed.compression.notes)


def test_outputs_that_are_no_logits_are_refused():
    model = nn.Sequential(nn.Linear(48, 4), nn.Flatten(0))
    with pytest.raises(ValueError, match="logits"):
        quantize(model)


def test_decoders_return_logits():
    model, x = llama(2), tokens(32, 24)
    packed = jlcm.quantize(model, "squeezellm", bits=4, calibration=x, progress=False)
    assert len(weights_of(packed)) == 15
    with torch.no_grad():
        plain = jlcm.quantize(model, "rtn", bits=4, progress=False)
        errors = [float((m(x).logits - model(x).logits).norm()) for m in (packed, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    "options", [{"sparse": 1}, {"outlier_range": -1.0}, {"sensitive": 1.0}, {"sensitive": -0.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        SqueezeLLM(**options)
