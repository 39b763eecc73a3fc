"""OPTQ: against brain surgery written column by column, groups of columns, and hard cases."""

import copy

import pytest
import torch
from conftest import build
from test_scalings import llama, tokens
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.methods.grid import group_size, join_groups
from jlcm.methods.optq import MOST_DAMPING, OPTQ, feedback_factor, round_with_feedback
from jlcm.methods.rtn import RTN, rounded
from jlcm.packing import packed_bytes
from jlcm.uniform import UniformWeight

KINDS = {
    "default": {},
    "min max": {"range": "min_max"},
    "as they come": {"act_order": False},
    "symmetric": {"symmetric": True, "range": "min_max"},
    "groups": {"group": 32},
    "ragged groups": {"group": 40},
    "groups as they come": {"group": 40, "act_order": False},
    "long groups as they come": {"group": 140, "act_order": False, "symmetric": True},
}


def problem(rows: int = 12, n: int = 150, count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows, n), and correlated inputs (n, count) of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + 0.5 * torch.eye(n)
    size = torch.rand(n, 1, generator=generator) + 0.1
    x = size * (mixing @ torch.randn(n, count, generator=generator))
    return torch.randn(rows, n, generator=generator), x


def loss(decoded: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((decoded - weight).double() @ x.double()).square().sum())


def surgery(weight: Tensor, gram: Tensor, bits: int, options: OPTQ) -> Tensor:
    """Optimal brain quantisation in a given order: no factor, no blocks, no lazy updates.

    After each column the inverse of the Hessian of those left follows by Gaussian elimination.
    """
    n = weight.shape[1]
    hessian = 2 * gram.double()
    hessian += options.damping * hessian.diagonal().mean() * torch.eye(n).double()
    inverse, left, result = torch.linalg.inv(hessian), weight.double().clone(), 0 * weight
    order = gram.diagonal().argsort(descending=True) if options.act_order else torch.arange(n)
    size = options.group or n
    for i in order.tolist():
        if options.act_order:
            first = i // size * size
            part = weight[:, first : first + size]
        elif i % size == 0:
            part = left[:, i : i + size].float()
        grid = RTN(range=options.range, symmetric=options.symmetric).grid(part, bits)
        result[:, i] = grid.values(grid.codes(left[:, i : i + 1].float()))[:, 0]
        error = (left[:, i] - result[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse -= inverse[:, i : i + 1] * inverse[i] / inverse[i, i]
    return result


def in_one_go(weight: Tensor, gram: Tensor, bits: int, options: OPTQ) -> Tensor:
    codes, grid, _ = round_with_feedback(weight[None], gram[None], bits, options)
    group = group_size(weight.shape[1], options.group)
    return grid.stored(codes, tuple(weight.shape), torch.float32, group=group)()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brain_surgery_column_by_column(kind, bits):
    (weight, x), options = problem(), OPTQ(**KINDS[kind])
    gram = x @ x.T / x.shape[1]
    found = in_one_go(weight, gram, bits, options)
    expected = surgery(weight, gram, bits, options)
    assert abs(loss(found, weight, x) / loss(expected, weight, x) - 1) < 0.02
    assert (found == expected).float().mean() > 0.95  # rounding tips a tie here and there
    assert loss(found, weight, x) < 0.8 * loss(
        rounded(weight, bits, options.rounding())(), weight, x
    )


def test_columns_do_not_help_each_other_where_inputs_are_independent():
    weight, _ = problem()
    found = in_one_go(weight, torch.diag(torch.rand(150) + 0.5), 3, OPTQ())
    assert torch.equal(found, rounded(weight, 3, RTN())())


def test_groups_of_a_convolution_are_rounded_each_by_itself():
    weights, inputs = zip(*(problem(4, 9, seed=seed) for seed in range(5)), strict=True)
    grams = torch.stack([x @ x.T / x.shape[1] for x in inputs])
    grams[3] = 0  # a dead channel
    codes, grid, damping = round_with_feedback(torch.stack(weights), grams, 3, OPTQ())
    together = grid.values(codes).view(5, 4, 9)
    assert damping == pytest.approx(0.01)
    for i in (0, 1, 2, 4):
        assert torch.equal(together[i], in_one_go(weights[i], grams[i], 3, OPTQ()))
    assert not together[3].any()


def test_inputs_that_are_never_used_get_weights_of_zero():
    weight, x = problem()
    x[[3, 77]] = 0
    found = in_one_go(weight, x @ x.T, 3, OPTQ())
    assert not found[:, [3, 77]].any()
    others = [i for i in range(150) if i not in (3, 77)]
    alone = in_one_go(weight[:, others], (x @ x.T)[others][:, others], 3, OPTQ())
    errors = [loss(part, weight[:, others], x[others]) for part in (found[:, others], alone)]
    assert abs(errors[0] / errors[1] - 1) < 0.05


def test_damping_is_raised_until_the_matrix_is_positive_definite():
    weight, x = problem(count=20)  # rank 20 of 150
    gram = x @ x.T / 20
    options = OPTQ(damping=1e-12)
    codes, grid, damping = round_with_feedback(weight[None], gram[None], 4, options)
    assert 1e-12 < damping < 1e-3
    found = grid.values(codes)
    assert loss(found, weight, x) < 0.2 * loss(rounded(weight, 4, RTN())(), weight, x)
    with pytest.raises(torch.linalg.LinAlgError, match="damping 10"):
        feedback_factor(gram[None] - 30 * gram.diagonal().mean() * torch.eye(150), 0.01)


def test_factor_is_that_of_the_inverse():
    _, x = problem()
    gram = x @ x.T / 600
    upper, damping = feedback_factor(gram[None], 0.01)
    assert damping == pytest.approx(0.01) and torch.equal(upper[0], upper[0].triu())
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(150))
    torch.testing.assert_close(upper[0].T @ upper[0], inverse, rtol=1e-3, atol=1e-3)


def quantize(model: nn.Module, inputs: Tensor, bits: int = 3, **options) -> nn.Module:
    return jlcm.quantize(
        model, "optq", bits=bits, options=OPTQ(**options), calibration=inputs, progress=False
    )


def uniform(packed: nn.Module) -> dict[str, UniformWeight]:
    return {n: held for n, held in stored_tensors(packed) if isinstance(held, UniformWeight)}


def images(size: int, count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, size // 2, size // 2, generator=generator)
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear")


@pytest.mark.parametrize("group", [None, 12])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_no_layer_is_worse_than_rounded_to_nearest(networks, name, group, tmp_path):
    model, x = networks[name]
    inputs = images(x.shape[-1])
    packed = quantize(model, inputs, group=group)
    start = jlcm.quantize(model, "rtn", bits=3, options=RTN(group=group), progress=False)
    assert len(packed.learning) == len(uniform(packed))
    assert all(result.after <= result.before for result in packed.learning)
    learned = [result.kept == "learned" for result in packed.learning]
    assert sum(learned) > 0.8 * len(learned)
    with torch.no_grad():
        new = images(x.shape[-1], 128)[64:]
        errors = [float((m(new) - model(new)).square().mean()) for m in (packed, start)]
    assert errors[0] < 0.8 * errors[1]
    assert jlcm.footprint(packed).alpha_layers == jlcm.footprint(start).alpha_layers
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(x), packed(x))
    assert jlcm.save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 8, 10, 24, 100])
def test_groups_have_scales_and_zero_points_of_their_own(mlp, group, symmetric):
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    packed = quantize(mlp, x, group=group, symmetric=symmetric)
    for held in uniform(packed).values():
        rows, columns = held.shape
        groups = 1 if group is None else -(-columns // group)
        assert held.group == (group if groups > 1 else None)
        zeros = 0 if symmetric else packed_bytes(rows * groups, 3)
        assert held.sizes()["scales"] == 2 * rows * groups + zeros
        assert held.sizes()["codes"] == packed_bytes(rows * columns, 3)
        assert held.groups() == (0, rows * groups)


def test_a_layer_reports_the_error_of_its_own_outputs():
    weight, x = problem()
    layer = build(nn.Linear, in_features=150, out_features=12)
    layer.weight.data.copy_(weight)
    packed = quantize(nn.Sequential(layer), x.T.contiguous())
    (result,), held = packed.learning, uniform(packed)["0.weight"]
    variance = (weight @ x).double().var(1, correction=0).sum() * x.shape[1]
    start = rounded(weight, 3, RTN())()
    assert result.before == pytest.approx(loss(start, weight, x) / float(variance), rel=1e-3)
    assert result.after == pytest.approx(loss(held(), weight, x) / float(variance), rel=1e-3)
    error = (held() - weight).norm() / weight.norm()
    assert held.relative_error == pytest.approx(float(error), rel=1e-4)


def test_raised_damping_is_noted_and_hopeless_layers_stay_rounded(monkeypatch):
    _, x = problem(count=20)
    layer = build(nn.Linear, in_features=150, out_features=12)
    packed = quantize(nn.Sequential(layer), x.T.contiguous(), damping=1e-12)
    noted = [note for note in packed.compression.notes if note.startswith("0.weight: damping")]
    assert len(noted) == 1 and "damping raised to" in packed.learning[0].note
    monkeypatch.setattr("jlcm.methods.optq.MOST_DAMPING", 1e-11)
    packed = quantize(nn.Sequential(layer), x.T.contiguous(), damping=1e-12)
    assert "rounded to nearest" in packed.learning[0].note
    assert any("not positive definite" in note for note in packed.compression.notes)
    held = uniform(packed)["0.weight"]
    assert torch.equal(held(), rounded(layer.weight, 3, RTN())())


def test_inputs_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="weight are NaN or infinite"):
        quantize(model, torch.full((20, 4), 1e38))


def test_groups_of_rounding_to_nearest():
    weight, _ = problem()
    held = rounded(weight, 3, RTN(group=40))
    starts = range(0, 150, 40)
    parts = [rounded(weight[:, i : i + 40], 3, RTN())() for i in starts]
    assert torch.equal(held(), torch.cat(parts, 1))
    padded = torch.arange(12.0).view(4, 3)
    assert join_groups(padded, 2, 5).tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]


def test_decoders_are_rounded_layer_by_layer():
    model, x = llama(2), tokens(32, 24)
    packed = quantize(model, x, group=16)
    assert len(packed.learning) == 15
    assert all(result.kept == "learned" for result in packed.learning)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"damping": 2 * MOST_DAMPING},
        {"group": 0},
        {"group": 12.0},
        {"act_order": 1},
        {"symmetric": "no"},
        {"range": "half"},
        {"positions": 0},
        {"memory": -1},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        OPTQ(**options)
    with pytest.raises(Invalid, match="group"):
        RTN(group=4, per_row=False)
