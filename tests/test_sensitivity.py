"""Fisher information, and bits shared out by it, against enumeration and brute force."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jlcm
from jlcm import sensitivity
from jlcm.config import Encoding, Invalid
from jlcm.layers import stored_tensors
from jlcm.sensitivity import estimate_distortions, fisher_information, unexplained_parts

#: Mean squared errors of the best 1- to 5-bit codebooks for a normal variable (Max, 1960).
NORMAL = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499)


class Unsafe(nn.Module):
    """The gradient of a root is not finite at 0, its value is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return x @ self.weight.abs().sqrt().T


class Branches(nn.Module):
    """A branch that barely matters and one that does."""

    def __init__(self):
        super().__init__()
        self.stem, self.weak, self.strong = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x).tanh()
        x = x + 0.01 * self.weak(x).tanh()
        return 4 * self.head(x + self.strong(x).tanh())


def branches():
    torch.manual_seed(0)
    return Branches().eval()


def network(*sizes):
    torch.manual_seed(0)
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*layers))[:-1].eval()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("weight")}


def estimate(model, x, runs=1, **options):
    """Mean over several draws of the labels."""
    found = [
        fisher_information(model, weights_of(model), x, seed=s, progress=False, **options)
        for s in range(runs)
    ]
    return {name: torch.stack([f[name] for f in found]).mean(0) for name in found[0]}


def compress(model, **options):
    given = {"alpha": 7.5, "init": "kmeans", "reorder": "none", "progress": False}
    return jlcm.compress(model, **given | options)


def enumerated(model, x):
    """Per input, the sum over positions and classes of p (d log p / d w)^2."""
    weights = weights_of(model)
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    for row in x.flatten(0, -2):  # positions are independent in these networks
        logs = model(row).log_softmax(-1)
        for log in logs:
            gradients = torch.autograd.grad(log, list(weights.values()), retain_graph=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += log.detach().exp() * gradient.square()
    return {name: total / len(x) for name, total in sums.items()}


def distortions(model, fisher, x, most_bits=8):
    """Of plain clustering, by which no other inputs of a neuron make up for errors."""
    found = estimate_distortions(
        model,
        weights_of(model),
        x,
        fisher,
        most_bits=most_bits,
        learned=False,
        progress=False,
    )
    *inner, _last = found
    for name in inner:
        found[name][0] /= sensitivity.ONE_BIT
    return found


def of_one(weight, fisher, x=None, most_bits=8):
    """Distortions of a single linear layer."""
    model = nn.Linear(*weight.shape[::-1], bias=False)
    model.weight.data.copy_(weight)
    x = normal(16, 2, weight.shape[1], seed=5) if x is None else x
    return distortions(model, {"weight": fisher}, x, most_bits)["weight"]


def divergence(model, other, x):
    """Mean KL per input from its definition."""
    with torch.no_grad():
        p, q = (m.double()(x.double()).log_softmax(-1) for m in map(copy.deepcopy, (model, other)))
    return float((p.exp() * (p - q)).sum() / len(x))


@pytest.mark.parametrize("shape", [(128, 5), (40, 3, 5)])
def test_estimate_converges_to_the_enumerated_fisher_information(shape):
    model, x = network(5, 6, 4), normal(*shape)
    expected, found = enumerated(model, x), estimate(model, x, runs=60)
    for name, values in expected.items():
        assert found[name].shape == values.shape and found[name].dtype == torch.float32
        assert float(found[name].sum()) == pytest.approx(float(values.sum()), rel=0.06)
        assert float((found[name] - values).norm() / values.norm()) < 0.15
    first = estimate(model, x)
    for name, values in expected.items():
        noise = (first[name] - values).norm()
        assert (found[name] - values).norm() < 0.4 * noise  # 1 / sqrt(60) expected


def test_linear_softmax_has_the_closed_form():
    model, x = network(6, 4), normal(200, 6)
    with torch.no_grad():
        shares = model(x).softmax(1)
    expected = (shares * (1 - shares)).T @ x.square() / len(x)
    torch.testing.assert_close(enumerated(model, x)["0.weight"], expected)
    torch.testing.assert_close(
        estimate(model, x, runs=80)["0.weight"], expected, rtol=0.2, atol=0.005
    )


def test_half_the_weighted_squared_error_predicts_the_divergence():
    model, x = network(6, 8, 5), normal(256, 6)
    fisher, generator = estimate(model, x, runs=10), torch.Generator().manual_seed(3)
    predicted, measured = 0.0, 0.0
    for _ in range(60):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in weights_of(other).items():
                delta = 0.02 * torch.randn(weight.shape, generator=generator)
                weight += delta
                predicted += 0.5 * float((fisher[name] * delta.square()).sum())
        measured += divergence(model, other, x)
    assert measured == pytest.approx(predicted, rel=0.12)


def test_distortions_predict_the_divergence_of_packed_networks():
    model, x = network(24, 64, 48, 10), normal(256, 24)
    costs = distortions(model, estimate(model, x), x, 3)
    for alpha, bits in ((7.0, 2), (5.0, 3)):
        packed = compress(model, alpha=alpha)
        assert {layer.bits for layer in jlcm.footprint(packed).layers} == {bits}
        predicted = sum(found[bits - 1] for found in costs.values())
        assert 0.5 < divergence(model, packed, x) / predicted < 2


def test_batches_seeds_and_the_largest_number_of_inputs():
    model, x = network(5, 6, 4), normal(sensitivity.MOST_INPUTS + 40, 5)
    whole = estimate(model, x)
    for other in (list(x.split(32)), x[: sensitivity.MOST_INPUTS]):
        found = estimate(model, other)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    again = fisher_information(model, weights_of(model), x, seed=1, progress=False)
    assert not torch.equal(again["0.weight"], whole["0.weight"])


def test_the_network_is_left_as_it_was():
    model, x = network(5, 6, 4), normal(16, 5)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # however it is called
        found = estimate(model, x)
    assert float(found["0.weight"].sum()) > 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="must return logits"):
        fisher_information(
            nn.Sequential(model, nn.Flatten(0)), weights_of(model), x, progress=False
        )
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_weights_that_do_not_act_have_no_information():
    model, unused = network(5, 6, 4), nn.Linear(3, 2)
    weights = weights_of(model) | {"unused": unused.weight}
    found = fisher_information(model, weights, normal(8, 5), progress=False)
    assert found["unused"].shape == (2, 3) and not found["unused"].any()
    assert found["0.weight"].any()


def test_unusable_inputs_and_gradients_are_errors():
    model = network(5, 6, 4)
    for empty in ([], torch.empty(0, 5), [torch.empty(0, 5)]):
        with pytest.raises(ValueError, match="calibration set is empty"):
            estimate(model, empty)
    unsafe = Unsafe()
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimate(unsafe, normal(8, 4))
    assert unsafe.weight.requires_grad


def test_nan_inputs_are_a_value_error():
    x = normal(8, 5)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        estimate(network(5, 6, 4), x)


def test_distortions_of_normal_weights_are_those_of_the_best_quantizers():
    weight = normal(256, 256) * torch.linspace(0.1, 3, 256)[:, None]
    found = of_one(weight, torch.full_like(weight, 1000.0))
    energy = 500 * float(weight.square().sum())
    assert [d / energy for d in found[:5]] == pytest.approx(NORMAL, rel=0.04)
    assert all(b < a for a, b in itertools.pairwise(found))
    assert found[5:] == pytest.approx([found[4] / 4, found[4] / 16, found[4] / 64])


def test_predicted_distortions_scale_with_the_importance_and_not_with_row_norms():
    weight, fisher = normal(24, 40), normal(24, 40, seed=2).square()
    found = of_one(weight, fisher)[2:]
    assert of_one(weight, 1000 * fisher)[2:] == pytest.approx([1000 * d for d in found])
    factors = torch.logspace(-2, 2, 24)[:, None]
    same = of_one(weight * factors, fisher / factors.square())[2:]
    assert same == pytest.approx(found, rel=1e-3)
    assert of_one(weight, fisher, most_bits=4)[2:] == pytest.approx(found[:2])


def test_narrow_codes_are_measured():
    kmeans1d = pytest.importorskip("kmeans1d")
    weight, x = normal(48, 256) * torch.linspace(0.02, 0.1, 48)[:, None], normal(32, 256, seed=3)
    found = of_one(weight, torch.full_like(weight, 1e-9), x)
    assert found[2] < 1e-6 * found[1]  # predicted to do no harm
    norms = weight.square().mean(1, keepdim=True).sqrt()
    model, coded = (nn.Linear(256, 48, bias=False) for _ in range(2))
    model.weight.data.copy_(weight)
    for bits in (1, 2):
        codes, centroids = kmeans1d.cluster((weight / norms).flatten().tolist(), 2**bits)
        values = torch.tensor(centroids)[torch.tensor(codes)].view(48, 256)
        coded.weight.data.copy_(values * norms)
        assert found[bits - 1] == pytest.approx(divergence(model, coded, x), rel=0.1)


def test_distortions_follow_the_importance():
    weight = normal(16, 64)
    fisher = torch.full_like(weight, 1e-6)
    fisher[:, ::16] = 1.0  # 64 of 1024 weights share 32 codewords
    even = of_one(weight, torch.full_like(weight, float(fisher.mean())))
    assert of_one(weight, fisher)[4] < 0.5 * even[4]


def test_distortions_of_a_part_stand_for_all(monkeypatch):
    weight, fisher = normal(150, 331), normal(150, 331, seed=2).square()
    found = []
    for most in (10_000, 10**6):
        monkeypatch.setattr(sensitivity, "MOST_WEIGHTS", most)
        found.append(of_one(weight, fisher, most_bits=4)[2:])
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_distortions_of_tensors_that_do_not_matter_are_zero():
    assert of_one(torch.zeros(3, 4), torch.ones(3, 4)) == [0.0] * 8
    assert of_one(normal(3, 4), torch.zeros(3, 4))[2:] == [0.0] * 6


def test_distortions_of_small_tensors_and_zero_rows_are_finite():
    found = of_one(normal(2, 2), torch.ones(2, 2))
    assert found[1] < 1e-4 * found[0]  # a codeword for each
    rows = normal(4, 6)
    rows[1] = 0
    assert all(math.isfinite(d) for d in of_one(rows, torch.ones(4, 6)))


def test_estimating_distortions_leaves_the_network_as_it_was():
    model, x = network(24, 64, 48, 10), normal(64, 24)
    before = copy.deepcopy(model.state_dict())
    fisher = estimate(model, x)
    given = {"most_bits": 8, "learned": True, "progress": False}
    found = estimate_distortions(model, weights_of(model), list(x.split(16)), fisher, **given)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for costs in found.values():
        assert len(costs) == 8 and all(b <= a for a, b in itertools.pairwise(costs))


def test_one_bit_counts_more_but_for_the_layer_that_runs_last(monkeypatch):
    model, x = branches(), normal(32, 32)
    model.stem, model.head = nn.Linear(32, 32), nn.Linear(32, 32)
    model.forward = lambda x: model.stem(model.weak(x) + model.strong(x) + model.head(x))
    fisher = estimate(model, x)

    def found():
        return estimate_distortions(
            model, weights_of(model), x, fisher, most_bits=3, learned=False, progress=False
        )

    more = found()
    monkeypatch.setattr(sensitivity, "ONE_BIT", 1.0)
    for name, costs in found().items():
        factor = 1.0 if name == "stem.weight" else 4.0
        assert more[name] == pytest.approx([factor * costs[0], *costs[1:]])


def test_distortions_are_kept_for_the_same_network_inputs_and_seed(tmp_path, monkeypatch):
    model, x = network(24, 64, 10), normal(64, 24)

    def found(seed=0, x=x, **options):
        return sensitivity.distortions(
            model,
            weights_of(model),
            x,
            most_bits=8,
            learned=True,
            folder=tmp_path,
            seed=seed,
            progress=False,
            **options,
        )

    first = found()
    fisher = fisher_information(model, weights_of(model), x, progress=False)
    given = {"most_bits": 8, "learned": True, "progress": False}
    assert first == estimate_distortions(model, weights_of(model), x, fisher, **given)
    assert found(rotated=True) != first
    others = [found(seed=1), found(x=x + 1)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", None)  # nothing runs again
        assert [found(), found(seed=1), found(x=x + 1)] == [first, *others]
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "VERSION", 0)
        patch.setattr(sensitivity, "estimate_distortions", lambda *args, **kwargs: {"new": [1.0]})
        assert found() == {"new": [1.0]}
    model[2].bias.data += 1  # is not coded, but the outputs depend on it
    assert found() != first
    path = max(tmp_path.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        found()


def part(x):
    """Unexplained part of the inputs of a linear layer."""
    model = nn.Linear(x.shape[-1], 3)
    return unexplained_parts(model, weights_of(model), list(x.split(16)))["weight"]


def test_unexplained_part_is_the_conditional_variance():
    white = normal(32, 128, 12)
    assert part(white) == pytest.approx(1, abs=0.02)
    assert part(white + 2) == pytest.approx(1 / 5, rel=0.05)  # a bias makes up for the mean
    assert part(torch.cat([white, white], -1)) == pytest.approx(1 / 2, rel=0.05)
    # A chain of correlation 0.6, in which each input is rounded before the one it follows.
    chain = [white[..., 0]]
    for i in range(1, 12):
        chain.append(0.6 * chain[-1] + 0.8 * white[..., i])
    growth = torch.linspace(1, 2, 12)
    energy = growth.square()
    expected = (0.64 * energy.sum() + 0.36 * energy[0]) / energy.sum()
    found = part(torch.stack(chain, -1) * growth)
    assert found == pytest.approx(float(expected), rel=0.05)
    assert 0 < part(torch.zeros(8, 16, 4)) <= 1


def test_unexplained_parts_of_convolutions_and_attention():
    torch.manual_seed(0)
    smooth = F.avg_pool2d(normal(16, 4, 40, 40), 5, 1)
    parts = {}
    for groups in (1, 4):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups))
        parts[groups] = unexplained_parts(model, weights_of(model), [smooth])["0.weight"]
    assert 0 < parts[1] < 0.5  # neighbouring pixels tell of each other, channels do not
    assert parts[4] == pytest.approx(parts[1], rel=0.3)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    noise = unexplained_parts(model, weights_of(model), [normal(16, 4, 40, 40)])["0.weight"]
    assert noise == pytest.approx(1, abs=0.03)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    model.forward = lambda x: model.attention(x, x, x, need_weights=False)[0]
    names = "attention.in_proj_weight", "attention.out_proj.weight"
    weights = {name: model.get_parameter(name) for name in names}
    x = normal(16, 40, 1) + 0.1 * normal(16, 40, 8, seed=2)
    with torch.no_grad():
        found = unexplained_parts(model, weights, [x])
    assert found[names[0]] < 0.2 and 0 < found[names[1]] < 1


@pytest.mark.parametrize("encoding", ["multi_scale", "multi_codebook"])
@pytest.mark.parametrize("alpha", [5.33, 7.5])
def test_compression_with_bits_by_sensitivity_reaches_the_goal_with_less_divergence(
    encoding, alpha
):
    model, x = branches(), normal(128, 32)
    equal = compress(model, alpha=alpha, encoding=encoding)
    auto = compress(model, alpha=alpha, encoding=encoding, allocation="auto", calibration=x)
    for packed in (equal, auto):
        assert alpha <= jlcm.footprint(packed).alpha_layers < 1.05 * alpha
    bits = {layer.name: layer.bits for layer in jlcm.footprint(auto).layers}
    assert bits["weak.weight"] == 1 < min(bits["stem.weight"], bits["head.weight"])
    assert auto.compression.options["allocation"] == "auto"
    new = normal(400, 32, seed=7)
    assert divergence(model, auto, new) < 0.8 * divergence(model, equal, new)


def test_fisher_importance_is_that_of_the_calibration_inputs():
    model, x = branches(), normal(128, 32)
    estimated = compress(model, importance="fisher", calibration=x, seed=3)
    fisher = fisher_information(model, weights_of(model), x, seed=3, progress=False)
    given = compress(model, importance=fisher, seed=3)
    even = compress(model, seed=3)
    pairs = zip(estimated.buffers(), given.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(estimated.strong.weight, even.strong.weight)
    assert all(p.requires_grad for p in model.parameters())

    errors = []
    for packed in (estimated, even):
        stored = dict(stored_tensors(packed))
        squares = [fisher[n] * (stored[n]() - w).square() for n, w in weights_of(model).items()]
        errors.append(sum(float(square.detach().sum()) for square in squares))
    assert errors[0] < errors[1]


def test_networks_of_whole_kinds_are_compressed_by_sensitivity(networks):
    for model, x in networks.values():
        inputs = torch.cat([x, x.flip(0) * 0.7])
        packed = compress(model, alpha=4.5, allocation="auto", calibration=inputs)
        assert jlcm.footprint(packed).alpha_layers >= 4.5
        assert all(1 <= layer.bits <= 8 for layer in jlcm.footprint(packed).layers)
        assert F.mse_loss(packed(x), model(x)) < model(x).var()


@pytest.mark.parametrize("option", [{"allocation": "auto"}, {"importance": "fisher"}])
def test_sensitivity_needs_calibration_inputs(mlp, option):
    with pytest.raises(Invalid, match="need calibration inputs: pass calibration="):
        compress(mlp, **option)
    with pytest.raises(ValueError, match="calibration set is empty"):
        compress(mlp, calibration=[], **option)


def test_unknown_choices_list_those_that_exist(mlp):
    with pytest.raises(Invalid, match="allocation='best' is not one of uniform, auto"):
        compress(mlp, allocation="best")
    with pytest.raises(Invalid, match="importance='hessian' is not one of fisher"):
        compress(mlp, importance="hessian")


@pytest.mark.parametrize("option", [{"budget": "per_layer"}, {"fold_bn": True}])
def test_bits_by_sensitivity_do_not_go_with_other_rules_of_the_budget(mlp, option):
    with pytest.raises(Invalid, match=next(iter(option))):
        compress(mlp, allocation="auto", encoding=Encoding(**option), calibration=normal(32, 24))
