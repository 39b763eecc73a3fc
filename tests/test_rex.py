"""REx: what a term is, that each lowers the error, and the bytes that they share."""

import math

import pytest
import torch
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.expanded import ExpandedWeight, outlier_bytes
from jlcm.layers import stored_tensors
from jlcm.methods.network import Network
from jlcm.methods.rex import Expansion, REx, choose_rows, rex, round_rows
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight


def randn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


WEIGHTS = {
    "wide": randn(24, 90),
    "conv": randn(16, 5, 3, 3, seed=1, size=0.2),
    "depthwise": randn(40, 1, 3, 3, seed=2),
    "short": randn(5, 12, seed=3, size=2.0),
}


def network(alpha: float, bits: int | None = None, weights=WEIGHTS) -> Network:
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
    bits = bits or min(math.floor(16 / alpha), 8)
    return Network(nn.Module(), parameters, dict.fromkeys(weights, bits), alpha, progress=False)


def errors(stored: dict[str, StoredWeight], weights=WEIGHTS) -> float:
    return sum(float((held() - weights[name]).square().sum()) for name, held in stored.items())


def nbytes(stored: dict[str, StoredWeight]) -> int:
    return sum(sum(held.sizes().values()) for held in stored.values())


def goal(alpha: float, weights=WEIGHTS) -> int:
    return int(2 * sum(weight.numel() for weight in weights.values()) / alpha)


def by_hand(matrix: Tensor, bits: int) -> Tensor:
    """Symmetric rounding of each row with a float16 scale."""
    most = 2 ** (bits - 1) - 1
    step = (matrix.abs().amax(1) * ((most + 1) / most)).half().float()[:, None] / (most + 1)
    return (matrix / step).round().clamp(-most, most) * step


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_terms_round_symmetrically(bits):
    matrix = randn(10, 30)
    plain = round_rows(matrix, bits, (10, 30), searched=False)
    assert torch.allclose(plain(), by_hand(matrix, bits), rtol=1e-6, atol=0)
    searched = round_rows(matrix, bits, (10, 30), searched=True)
    for row, one, other in zip(matrix, plain(), searched(), strict=True):
        assert (row - other).norm() <= (row - one).norm()
    assert int(searched.unpack_codes().min()) >= 1 and searched.zeros is None
    assert torch.equal(
        round_rows(torch.zeros(2, 3), bits, (2, 3), searched=True)(), torch.zeros(2, 3)
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_two_terms_of_all_rows_are_double_rounding(bits):
    options = REx(bits=bits, orders=2, range="min_max")
    stored = rex(network(1.1), options)
    for name, weight in WEIGHTS.items():
        matrix = weight.reshape(len(weight), -1)
        once = by_hand(matrix, bits)
        expected = once + by_hand(matrix - once, bits)
        assert torch.allclose(stored[name]().view_as(matrix), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(stored[name].row_masks()[0], torch.ones(len(weight)).bool())


@pytest.mark.parametrize("kind", ["search", "min_max"])
def test_error_falls_with_each_term(kind):
    found = [errors(rex(network(1.1), REx(bits=2, orders=k, range=kind))) for k in range(1, 6)]
    assert all(later < 0.6 * earlier for earlier, later in zip(found, found[1:], strict=False))


def test_error_falls_with_the_bytes():
    alphas = (8.0, 6.0, 5.33, 4.5, 4.0, 3.0)
    found = [errors(rex(network(alpha), REx(bits=2, orders=3))) for alpha in alphas]
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("alpha", [2.0, 2.9, 4.0, 4.2])
@pytest.mark.parametrize("outliers", [0.0, 0.03])
def test_budget_is_kept_to_the_byte(alpha, outliers):
    stored = rex(network(alpha), REx(orders=9, outliers=outliers))
    assert all(held.bits == max(math.floor(16 / alpha) - 1, 2) for held in stored.values())
    spent = nbytes(stored)
    # No row is left that would fit: the cheapest has 9 weights.
    assert goal(alpha) - 2 - math.ceil(9 * stored["wide"].bits / 8) - 5 <= spent <= goal(alpha)
    if outliers:
        sparse = sum(held.sizes().get("outliers", 0) for held in stored.values())
        assert outliers * goal(alpha) - 5 <= sparse <= outliers * goal(alpha)


def test_outliers_are_the_largest_differences_and_counted_with_their_gaps():
    options = {"bits": 3, "orders": 1}
    plain, sparse = (rex(network(4.0), REx(**options, outliers=o)) for o in (0.0, 0.04))
    assert errors(sparse) < errors(plain)
    taken, kept = [], []
    for name, weight in WEIGHTS.items():
        missing = (weight - plain[name]()).view(-1).abs()
        if isinstance(sparse[name], UniformWeight):
            kept.append(missing)
            continue
        used = sparse[name].values != 0
        positions = sparse[name].positions()[used]
        assert sparse[name].sizes()["outliers"] == outlier_bytes(positions)
        taken.append(missing[positions])
        rest = torch.ones(len(missing)).bool()
        rest[positions] = False
        kept.append(missing[rest])
        after = (weight - sparse[name]()).view(-1).abs()
        assert after[positions].max() < 1e-2 * taken[-1].min()
        assert torch.equal(after[rest], missing[rest])
    assert torch.cat(taken).min() >= torch.cat(kept).max()


def test_rows_with_the_largest_errors_come_first():
    weight = randn(30, 64)
    base = round_rows(weight, 2, weight.shape, searched=True)
    part = Expansion(base, weight - base())
    budget = part.term_bytes(7) + 3
    (mask,) = choose_rows([part], budget, searched=True)
    assert mask.sum() == 7
    term = round_rows(part.residual, 2, weight.shape, searched=True)
    gain = part.residual.square().sum(1) - (part.residual - term()).square().sum(1)
    assert gain[mask].min() >= gain[~mask].max()
    # As many bytes as promised, and what is missing afterwards is kept along.
    part.add_term(mask, searched=True)
    stored = sum(b.numel() * b.element_size() for b in part.terms[0][1].buffers())
    assert stored + 4 == part.term_bytes(7)
    assert torch.allclose(part.residual[~mask], (weight - base())[~mask])
    assert torch.allclose(part.residual[mask], (weight - base())[mask] - part.terms[0][1]())


def test_layers_that_gain_nothing_stay_uniform():
    weights = {"zero": torch.zeros(8, 20), "plain": randn(8, 20)}
    stored = rex(network(2.0, weights=weights), REx(bits=2, orders=4, outliers=0.1))
    assert isinstance(stored["zero"], UniformWeight) and torch.equal(
        stored["zero"](), weights["zero"]
    )
    assert isinstance(stored["plain"], ExpandedWeight) and len(stored["plain"].terms) == 3


def test_goal_that_the_first_terms_miss():
    missed = network(8.0)
    stored = rex(missed, REx(outliers=0.1, orders=3))
    assert all(type(held) is UniformWeight and held.bits == 2 for held in stored.values())
    assert sum("more bytes than the goal" in note for note in missed.notes) == 1
    met = network(5.33)
    rex(met, REx())
    assert len(met.notes) == 2 and not any("more bytes" in note for note in met.notes)


@pytest.mark.parametrize(
    ("alpha", "given", "option", "expected"),
    [
        (5.33, None, None, 2),
        (4.0, None, None, 3),
        (16.0, None, None, 2),
        (1.5, None, None, 8),
        (1.9, None, None, 7),
        (4.0, 8, None, 8),
        (4.0, 3, None, 3),
        (4.0, 1, None, 2),
        (4.0, 8, 3, 3),
    ],
)
def test_bits_of_the_terms(alpha, given, option, expected):
    stored = rex(network(alpha, given), REx(bits=option))
    assert {held.bits for held in stored.values()} == {expected}
    if given == 8 and option is None:
        assert all(type(held) is UniformWeight for held in stored.values())


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_networks(networks, name):
    model, x = networks[name]
    expected = model(x).detach()
    packed = jlcm.quantize(model, "rex", bits=8, alpha=1.8, progress=False)
    assert (packed(x) - expected).norm() <= 0.02 * expected.norm()
    found = []
    for alpha in (2.0, 3.0, 4.0):
        packed = jlcm.quantize(model, "rex", alpha=alpha, progress=False)
        assert jlcm.footprint(packed).alpha_layers >= alpha
        found.append(float((packed(x) - expected).norm()))
    assert found[0] < found[1] < found[2]
    again = jlcm.quantize(model, "rex", alpha=4.0, progress=False)
    assert torch.equal(again(x), packed(x))
    half = jlcm.quantize(model.half(), "rex", alpha=4.0, progress=False)
    stored = [held for _, held in stored_tensors(half) if isinstance(held, StoredWeight)]
    assert all(held.dtype == torch.float16 == held().dtype for held in stored)


def test_no_weight_beside_the_ends():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    options = REx(outliers=0.1, orders=3)
    packed = jlcm.quantize(model, "rex", options=options, first_last="int8", progress=False)
    assert not any(isinstance(held, UniformWeight) for _, held in stored_tensors(packed))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 9},
        {"orders": 0},
        {"outliers": 1},
        {"outliers": -0.1},
        {"range": "all"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(Invalid):
        REx(**options)
