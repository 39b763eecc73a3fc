"""Learned rounding: AdaRound, BRECQ and NUPES."""

import copy
import itertools

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jlcm
from jlcm.layers import stored_tensors
from jlcm.learning.partition import find_blocks
from jlcm.methods.adaround import AdaRound
from jlcm.methods.brecq import Brecq, _Block
from jlcm.methods.grid import as_rows, min_max, search
from jlcm.methods.network import Network
from jlcm.methods.nupes import Nupes, PowerRounding
from jlcm.methods.powerquant import PowerQuant, powerquant
from jlcm.methods.reconstruction import Rounding, Steps, calibration_of, train
from jlcm.uniform import UniformWeight

FAST = {
    "adaround": AdaRound(iterations=300, lr=0.03, batch_size=256),
    "brecq": Brecq(iterations=150, lr=0.03, precision="fp32"),
    "nupes": Nupes(iterations=300, batch_size=256),
}


class Residual(nn.Module):
    """A small network with a residual block, depthwise convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.deep_norm = nn.BatchNorm2d(16)
        self.point, self.point_norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.head = nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.deep_norm(self.deep(x)))
        x = self.relu(x + self.point_norm(self.point(y)))
        return self.head(x.mean((2, 3)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    randomise(model)
    return model.eval()


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)  # neighbours alike, as in pictures
    return F.interpolate(coarse, (8, 8), mode="bilinear") + 0.1 * torch.randn(
        count, 3, 8, 8, generator=generator
    )


def quantize(model, method, **options):
    settings = {"bits": 3, "calibration": images(128, 1), "progress": False}
    return jlcm.quantize(model, method, **settings | options)


@torch.no_grad()
def error(packed, model) -> float:
    x = images(256, 2)
    return float((packed(x) - model(x)).square().mean())


def uniform(packed):
    return {n: s for n, s in stored_tensors(packed) if isinstance(s, UniformWeight)}


@pytest.mark.parametrize("method", FAST)
def test_learned_rounding_is_better_than_its_start_at_equal_bytes(method):
    model = network()
    start = quantize(model, "powerquant" if method == "nupes" else "rtn")
    packed = quantize(model, method, options=FAST[method])
    assert error(packed, model) < 0.7 * error(start, model)
    assert jlcm.footprint(packed).alpha_layers == jlcm.footprint(start).alpha_layers
    for result in packed.learning:
        assert result.after <= result.before
        assert (result.kept == "learned") == (result.after < result.before)
    assert all(result.kept == "learned" for result in packed.learning)


@pytest.mark.parametrize("method", FAST)
def test_never_worse_than_the_start_on_the_calibration_inputs(method):
    options = FAST[method]
    harmful = type(options)(iterations=3, lr=30.0, warmup=0.0, lambda_=0.0)
    packed = quantize(network(), method, options=harmful)
    start = quantize(network(), "powerquant" if method == "nupes" else "rtn")
    for result in packed.learning:
        assert result.after <= result.before
        assert bool(result.note) == (result.kept != "learned")
    assert any(result.note for result in packed.learning)
    assert error(packed, network()) < 2 * error(start, network())


@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_every_weight_is_rounded_up_or_down(method):
    model = network()
    packed = quantize(model, method, options=FAST[method], bits=4)
    start = uniform(quantize(model, "rtn", bits=4))
    moved = 0
    for name, held in uniform(packed).items():
        assert torch.equal(held.scales, start[name].scales)
        assert torch.equal(held.zeros, start[name].zeros)
        difference = held.unpack_codes().int() - start[name].unpack_codes().int()
        assert difference.abs().max() <= 1
        moved += int(difference.abs().sum())
    assert moved > 0


@pytest.mark.parametrize("method", FAST)
def test_runs_are_reproducible_and_survive_a_file(method, tmp_path):
    model = network()
    first, second = (quantize(model, method, options=FAST[method]) for _ in range(2))
    for name, held in uniform(first).items():
        for part, tensor in held.named_buffers():
            assert torch.equal(tensor, dict(uniform(second)[name].named_buffers())[part])
    jlcm.save(first, tmp_path / "a.safetensors")
    loaded = jlcm.load(tmp_path / "a.safetensors", model=network(3))
    x = images(8, 5)
    assert torch.equal(loaded(x), first(x))


@pytest.mark.parametrize("method", FAST)
def test_ends_in_eight_bits_stay(method):
    model = network()
    packed = quantize(model, method, options=FAST[method], first_last="int8")
    plain = quantize(model, "rtn", first_last="int8")
    store, rounded = dict(stored_tensors(packed)), dict(stored_tensors(plain))
    for name in ("stem.weight", "head.weight"):
        assert store[name].bits == 8
        assert torch.equal(store[name].codes, rounded[name].codes)
    assert store["point.weight"].bits == 3


def test_fisher_weighted_blocks_improve_too():
    model = network()
    options = Brecq(iterations=150, lr=0.03, loss="fisher", precision="fp32")
    packed = quantize(model, "brecq", options=options)
    assert error(packed, model) < 0.7 * error(quantize(model, "rtn"), model)


def test_fisher_weights_of_the_last_block_are_the_gradient_of_the_divergence():
    model, x = network(), images(64, 1)
    with torch.no_grad():
        model.head.weight.mul_(10)
    packed = quantize(model, "rtn", bits=2, calibration=x)
    inputs = Network(model, {}, {}, 5.33, calibration=x)
    calibration = calibration_of(packed, model, inputs, positions=1, memory=2**30)
    *_, last = find_blocks(calibration, 2)
    options = Brecq(loss="fisher", precision="fp32")
    block = _Block(calibration, last, copy.deepcopy(packed), options, seed=0)
    with torch.no_grad():
        expected = (packed(x).softmax(1) - model(x).softmax(1)).abs().add(1).square()
    assert expected.max() > 1.01
    parts = [block.importance[i] for i in range(len(calibration.inputs))]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-4)


def test_blocks_hold_the_layers_between_single_tensors():
    packed = quantize(network(), "brecq", options=Brecq(iterations=2, weights=1))
    names = [result.name for result in packed.learning]
    assert names == [
        "stem.weight .. stem.weight",
        "deep.weight .. point.weight",
        "head.weight .. head.weight",
    ]


def test_adaround_finds_the_best_of_all_roundings():
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    x = torch.randn(400, 8) @ torch.randn(8, 8)
    packed = jlcm.quantize(
        nn.Sequential(layer),
        "adaround",
        bits=3,
        calibration=x,
        options=AdaRound(iterations=3000, batch_size=360, lambda_=1e-3),
        progress=False,
    )
    matrix = as_rows(layer.weight)
    grid = search(matrix, 3)
    floor = grid.position(matrix).floor()

    def loss(weight):
        return float(((x @ (weight - matrix).T) ** 2).mean())

    choices = itertools.product((0.0, 1.0), repeat=8)
    all_losses = [loss(grid.values((floor + torch.tensor(c)).clamp(0, 7))) for c in choices]
    reached = loss(packed[0].weight)
    assert min(all_losses) <= reached * (1 + 1e-6)
    assert reached <= sorted(all_losses)[2]
    assert reached < loss(grid.values(grid.codes(matrix)))


def stored(weight: torch.Tensor, bits: int = 3) -> UniformWeight:
    grid = min_max(weight, bits)
    return grid.stored(grid.codes(weight), tuple(weight.shape), torch.float32)


def test_rounding_starts_at_the_weight_and_its_penalty_at_the_middle():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    rounding = Rounding(stored(weight), weight)
    inside = (rounding.floor >= 0) & (rounding.floor < 7)
    assert inside.float().mean() > 0.8
    assert torch.allclose(rounding()[inside], weight[inside], atol=1e-5)
    with torch.no_grad():
        rounding.choice.fill_(0.0)  # h = 1/2
    assert rounding.penalty(2.0).item() == pytest.approx(weight.numel())
    with torch.no_grad():
        rounding.choice.copy_(torch.where(weight > 0, 9.0, -9.0))
    assert rounding.penalty(2.0).item() == pytest.approx(0, abs=1e-4)
    held = stored(weight)
    rounding.write(held)
    assert torch.allclose(held(), rounding(), atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0, 7.5])
def test_rounding_and_penalty_have_the_gradients_of_their_formulas(beta):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).mul_(1.5)
    rounding = Rounding(stored(weight.clamp(-1, 1)), weight)  # some weights beyond the grid
    with torch.no_grad():
        rounding.choice.add_(torch.randn(5, 12, generator=torch.Generator().manual_seed(2)) * 2)
    pull = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    ((rounding() * pull).sum() + 0.3 * rounding.penalty(beta)).backward()

    choice = rounding.choice.detach().clone().requires_grad_()
    up = (1.2 * choice.sigmoid() - 0.1).clamp(0, 1)
    grid = min_max(weight.clamp(-1, 1), 3)
    values = grid.values((rounding.floor + up).clamp(0, 7))
    penalty = (1 - (2 * up - 1).abs().pow(beta)).sum()
    ((values * pull).sum() + 0.3 * penalty).backward()
    assert torch.allclose(rounding(), values, atol=1e-6)
    assert rounding.penalty(beta).item() == pytest.approx(penalty.item(), rel=1e-5)
    assert torch.allclose(rounding.choice.grad, choice.grad, atol=1e-5)
    assert 0 < (choice.grad == 0).float().mean() < 1


def test_penalty_hardens():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    rounding = Rounding(stored(weight), weight)
    train([rounding], lambda step: rounding().sum() * 0, Steps(iterations=500, lr=0.1), "x")
    assert rounding.penalty(2.0).item() < 0.05 * weight.numel()


def power_weight(weight: torch.Tensor, bits: int) -> UniformWeight:
    network = Network(nn.Linear(1, 1), {"w": nn.Parameter(weight)}, {"w": bits}, 5.33)
    network.progress = False
    return powerquant(network, PowerQuant())["w"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_power_rounding_starts_at_the_weight_and_rounds_to_powerquant(bits):
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    held = power_weight(weight, bits)
    rounding = PowerRounding(held, weight)
    assert torch.allclose(rounding(), weight, atol=1e-3)
    before = held().clone()
    rounding.write(held)
    # Rounding of the scale to 16 bits may move a weight at a border by one level.
    assert ((held() - before).abs() > 0.01).float().mean() < 0.01


def test_power_rounding_writes_what_it_computes():
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    held = power_weight(weight, 3)
    rounding = PowerRounding(held, weight)
    with torch.no_grad():
        rounding.raw.add_(0.3)
        power = F.softplus(rounding.raw)
        wanted = (rounding._place(power) + torch.randn_like(weight)).round()
        rounding.offset.add_(wanted - rounding._place(power))
    rounding.write(held)
    assert rounding.penalty(2.0).item() == pytest.approx(0, abs=1e-3)
    assert torch.allclose(held(), rounding(), rtol=5e-3, atol=1e-3)


def test_powers_are_learned_layer_by_layer():
    packed = quantize(network(), "nupes", options=FAST["nupes"])
    powers = {float(held.power) for held in uniform(packed).values()}
    assert len(powers) > 1 and all(0 < power < 2 for power in powers)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("method", FAST)
def test_layers_that_do_not_run_are_rounded_to_nearest_and_said(method):
    torch.manual_seed(0)
    x = torch.randn(64, 16) @ torch.randn(16, 16)
    packed = quantize(Unused().eval(), method, calibration=x, options=FAST[method])
    notes = {result.name: result.note for result in packed.learning}
    assert "rounded to nearest" in notes["unused.weight"]
    assert any(result.kept == "learned" for result in packed.learning)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else x


def test_untraceable_networks_are_learned_layer_by_layer():
    packed = jlcm.quantize(
        Branching(), "brecq", bits=3, calibration=torch.randn(64, 8), progress=False
    )
    assert any("layer by layer" in note for note in packed.compression.notes)
    assert packed.learning[0].kept == "learned"


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "pass calibration="),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.zeros(3, 3, 8, 8), "too few"),
        (torch.full((32, 3, 8, 8), float("nan")), "NaN"),
    ],
)
def test_bad_calibration_inputs_are_refused(method, inputs, message):
    with pytest.raises(ValueError, match=message):
        quantize(network(), method, calibration=inputs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdaRound, {"iterations": 0}),
        (AdaRound, {"lr": -1}),
        (AdaRound, {"warmup": 1.0}),
        (AdaRound, {"batch_size": 0}),
        (Brecq, {"loss": "l1"}),
        (Brecq, {"weights": 0}),
        (Brecq, {"beta": (0.0, 2.0)}),
        (Nupes, {"lr_power": -0.1}),
    ],
)
def test_impossible_options_are_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_original_is_left_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    quantize(model, "adaround", options=AdaRound(iterations=2))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
