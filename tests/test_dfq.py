"""DFQ: biases take the mean error, outputs and bytes, files remember the ReLU."""

import copy
import math

import pytest
import torch
from conftest import randomise
from folding import Net, X, conv, folded, off, stack
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional

import jlcm
from jlcm.methods.chains import Chains, rectified_mean
from jlcm.methods.dfq import DFQ, absorb
from jlcm.methods.rtn import RTN
from jlcm.quantize import quantize

PLAIN = {"progress": False, "bits": 8}
#: The paper's own choices.
PAPER = DFQ(unclip=True, per_row=False)

# Biases ------------------------------------------------------------------------------------------


def test_rectified_mean_is_the_mean_of_samples():
    mean = torch.tensor([-2.0, -0.5, 0.0, 0.7, 3.0, 1.0, -1.0])
    deviation = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1, 0.0, 0.0])
    noise = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    sampled = (mean + deviation * noise).relu().mean(0)
    assert torch.allclose(rectified_mean(mean, deviation), sampled, atol=0.01)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity])
def test_expected_inputs_are_the_means_of_samples(activation):
    # Wide deviations, so that the clipping at 6 matters.
    model = Net(
        lambda m, x: m.b(m.s(m.n(m.a(x)))),
        a=conv(),
        n=nn.BatchNorm2d(4),
        s=activation(),
        b=conv(),
    )
    with torch.no_grad():
        model.n.bias.copy_(torch.tensor([-3.0, 0.0, 4.0, 7.0]))
        model.n.weight.copy_(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    reference, norms = folded(model)
    expected = Chains(reference, norms).inputs()
    noise = torch.randn(400_000, 4, generator=torch.Generator().manual_seed(0))
    sampled = activation()(norms["a"][0] + norms["a"][1] * noise).mean(0)
    assert expected.keys() == {"b"}
    assert torch.allclose(expected["b"], sampled, atol=0.02)


def test_expected_inputs_of_sums_averages_and_norms_that_are_not_folded():
    summed = Net(
        lambda m, x: m.c(m.s(m.n(m.a(x)) + m.k(m.b(x)))),
        a=conv(),
        b=conv(),
        c=conv(),
        n=nn.BatchNorm2d(4),
        k=nn.BatchNorm2d(4),
        s=nn.Identity(),
    )
    reference, norms = folded(summed)
    expected = Chains(reference, norms).inputs()
    assert torch.equal(expected["c"], summed.n.bias + summed.k.bias)
    reference.s = nn.ReLU()  # the sum's deviation is unknown
    assert Chains(reference, norms).inputs() == {}

    averaged = Net(
        lambda m, x: m.b(m.n(m.a(x)).relu().mean((2, 3))),
        a=conv(),
        n=nn.BatchNorm2d(4),
        b=nn.Linear(4, 3),
    )
    before = Net(lambda m, x: m.b(m.n(x).relu()), n=nn.BatchNorm2d(4), b=conv())
    for model in (averaged, before):
        expected = Chains(*folded(model)).inputs()["b"]
        assert torch.equal(expected, rectified_mean(model.n.bias, model.n.weight.abs()))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_correction_cancels_the_mean_error(groups):
    """The input of the second layer is drawn from the statistics that its norm states."""
    second = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    model = Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(), n=nn.BatchNorm2d(4), b=second)
    options = {"equalise": False, "absorb": False}
    packed = {
        correct: quantize(model, "dfq", bits=3, options=DFQ(correct=correct, **options))
        for correct in (False, True)
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 4, 3, 3, generator=generator)
    x = (model.n.bias.view(-1, 1, 1) + model.n.weight.view(-1, 1, 1) * noise).relu()
    shift = {k: (p.b(x) - model.b(x)).mean((0, 2, 3)).norm() for k, p in packed.items()}
    assert torch.equal(packed[True].b.weight, packed[False].b.weight)
    assert shift[False] > 0.02 and shift[True] <= 0.05 * shift[False]
    # The formula, element by element.
    change = (packed[True].b.weight - model.b.weight).detach()
    per_group, out = 4 // groups, 8 // groups
    means = [
        g / math.sqrt(2 * math.pi) * math.exp(-((b / g) ** 2) / 2)
        + float(b) * 0.5 * (1 + math.erf(float(b) / g / math.sqrt(2)))
        for b, g in zip(model.n.bias.tolist(), model.n.weight.tolist(), strict=True)
    ]
    for row in range(8):
        first = row // out * per_group
        taken = sum(float(change[row, i].sum()) * means[first + i] for i in range(per_group))
        assert float(packed[True].b.bias[row]) == pytest.approx(-taken, rel=1e-3, abs=1e-5)


def test_absorbed_activations_move_into_the_bias():
    model = stack(nn.ReLU)
    with torch.no_grad():
        model[1].bias += torch.linspace(0, 8, 8)
    reference, norms = folded(model)
    pairs, other, before = Chains(reference, norms).pairs(), copy.deepcopy(reference), dict(norms)
    absorb(other, pairs, norms)
    mean, deviation = before["0"]
    shift = (mean - 3 * deviation).clamp(min=0)
    assert 0 < (shift > 0).sum() < 8
    assert torch.allclose(norms["0"][0], mean - shift)
    assert torch.allclose(other[0].bias, reference[0].bias - shift)
    added = other[3].bias - reference[3].bias
    assert torch.allclose(added, reference[3].weight.sum((1, 2, 3)) * shift, atol=1e-5)
    # Inside the border, and where no activation is below the shift, nothing changes.
    inner = mean.view(-1, 1, 1) + deviation.view(-1, 1, 1) * torch.rand(2, 8, 5, 5)
    one = functional.conv2d(inner.relu(), reference[3].weight, reference[3].bias, groups=8)
    moved = (inner - shift.view(-1, 1, 1)).relu()
    two_ = functional.conv2d(moved, other[3].weight, other[3].bias, groups=8)
    assert torch.allclose(one, two_, atol=1e-4)


# The method --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_last", ["same", "int8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_eight_bits_keep_the_output(cnn, images, first_last, per_row):
    for model, x in ((cnn, images[:, :, :8, :8]), (stack(nn.ReLU), X)):
        options = DFQ(per_row=per_row, absorb=False)
        packed = quantize(model, "dfq", first_last=first_last, options=options, **PLAIN)
        assert off(packed(x), model(x)) <= 0.02


def test_one_grid_for_the_tensor_needs_equalisation():
    model = stack(nn.ReLU)
    with torch.no_grad():
        model[1].weight *= torch.logspace(-2, 2, 8)
        model[1].bias *= torch.logspace(-2, 2, 8)
        model[3].weight *= torch.logspace(2, -2, 8).view(-1, 1, 1, 1)
    error = {
        method: off(quantize(model, method, bits=6, options=options, progress=False)(X), model(X))
        for method, options in (
            ("rtn", RTN(range="min_max", per_row=False)),
            ("dfq", DFQ(absorb=False, per_row=False)),
        )
    }
    assert error["dfq"] < 0.3 * error["rtn"]


def test_bytes():
    packed = quantize(stack(), "dfq", bits=4, options=PAPER, progress=False)
    count = jlcm.footprint(packed)
    sizes = [8 * 27, 8 * 9, 48, 30]
    assert count.codes == sum(size // 2 for size in sizes)
    assert count.scales == len(sizes) * (2 + 1)  # a float16 scale and a zero point of 4 bits
    assert count.other == 2 * (8 + 8 + 6 + 5)  # folded norms left biases


@pytest.mark.parametrize("first_last", ["same", "int8"])
def test_file_remembers_replaced_activations(tmp_path, first_last):
    model = stack()
    with torch.no_grad():  # activations beyond 6
        model[1].weight *= 100
    packed = quantize(model, "dfq", first_last=first_last, options=PAPER, progress=False)
    assert packed.compression.relu == ["2", "5"]
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=stack(seed=1))
    assert torch.equal(again(X), packed(X))
    assert again.compression.relu == ["2", "5"]
    assert jlcm.save(again, tmp_path / "again").read_bytes() == path.read_bytes()
    again[2] = again[5] = nn.ReLU6()
    assert not torch.equal(again(X), packed(X))
    for wrong in ({"relu": ["0"]}, {"relu": ["x"]}, {"relu": 3}, {"relu": [3]}):
        forged = copy.deepcopy(packed)
        forged.compression.relu = wrong["relu"]
        path = jlcm.save(forged, tmp_path / "forged")
        with pytest.raises(jlcm.checkpoint.CheckpointError, match="does not fit"):
            jlcm.load(path, model=stack())


def test_activations_inside_norms(tmp_path):
    def network() -> nn.Module:
        torch.manual_seed(0)
        norm = BatchNormAct2d(8, act_layer=nn.ReLU6)
        return randomise(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)))

    packed = quantize(network(), "dfq", options=DFQ(unclip=True, absorb=False), **PLAIN)
    assert packed.compression.relu == ["1.act"]
    plain = network()
    plain[1].act = nn.ReLU()
    assert off(packed(X), plain(X)) <= 0.02
    again = jlcm.load(jlcm.save(packed, tmp_path / "m"), model=network())
    assert torch.equal(again(X), packed(X))


def test_clipped_activations_may_stay():
    packed = quantize(stack(), "dfq", options=DFQ(unclip=False, absorb=False), **PLAIN)
    assert packed.compression.relu == [] and isinstance(packed[2], nn.ReLU6)
    assert off(packed(X), stack()(X)) <= 0.02
    assert "ReLU6 stays" in " ".join(packed.compression.notes)


def test_original_is_untouched():
    model = stack()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quantize(model, "dfq", progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert isinstance(model[2], nn.ReLU6)


def notes(model: nn.Module, **options: bool) -> str:
    chosen = {"unclip": True, "per_row": False} | options
    packed = quantize(model, "dfq", options=DFQ(**chosen), progress=False)
    listed = packed.compression.notes
    assert len(listed) == len(set(listed))
    return "\n".join(listed)


def test_notes_of_networks_that_lack_what_it_needs(vit):
    width = 6
    layer_norm = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
    found = notes(nn.Sequential(*layer_norm, nn.Linear(width, 3)))
    assert "no batch norm tells the mean" in found and "no two layers" in found
    assert "cannot trace" in notes(vit)
    clipped = Net(
        lambda m, x: m.c(m.s(m.b(functional.relu6(m.n(m.a(x)))))),
        **{name: conv() for name in "abc"},
        n=nn.BatchNorm2d(4),
        s=nn.ReLU6(),
    )
    found = notes(clipped)
    assert "layers around 1 clipped activations" in found
    assert "2 of 3 layers keep their bias" in found
    assert notes(clipped, equalise=False, correct=False) == ""
    assert "between equalised layers alone" in notes(nn.Sequential(*stack(), nn.ReLU6()))


def test_options_are_checked():
    with pytest.raises(jlcm.config.Invalid, match="absorb=1 must be true or false"):
        DFQ(absorb=1)


def test_half_precision_network():
    model = stack(nn.ReLU).bfloat16()
    packed = quantize(model, "dfq", options=DFQ(absorb=False), **PLAIN)
    assert off(packed(X.bfloat16()).float(), model(X.bfloat16()).float()) <= 0.05
