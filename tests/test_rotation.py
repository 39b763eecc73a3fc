"""Rotated rows: the rotation itself, files, learning, sensitivity."""

import copy
import hashlib
import math

import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import nn

import jlcm
from jlcm.config import Invalid
from jlcm.footprint import footprint
from jlcm.layers import stored_tensors
from jlcm.learning.objective import Moments
from jlcm.learning.options import Learn
from jlcm.learning.trainable import TrainableWeight, trainable_copy
from jlcm.packed import PackedWeight
from jlcm.reading import read_header
from jlcm.rotation import _signs, rotate, rotate_squares, unrotate
from jlcm.sensitivity import _clustered, unexplained_parts

SIZES = [1, 9, 15, 16, 24, 25, 27, 64, 147, 576, 1009, 1536, 4096, 11008]


class Net(nn.Module):
    """Depthwise, grouped and plain convolutions with norms, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.deep, self.second = nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.head = nn.Conv2d(16, 24, 3, groups=4), nn.Linear(24, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.second(self.deep(x)).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


def network():
    """With outliers in some inputs of every neuron."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                rows = module.weight.view(len(module.weight), -1)
                rows *= 4 * torch.rand(rows.shape[1]) ** 3
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.01, 0.1)
    return model


def images(count=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([2.0, 1.0, 0.2]).view(3, 1, 1)
    return scale * torch.randn(count, 3, 12, 12, generator=generator)


@pytest.mark.parametrize("n", SIZES)
def test_rotations_are_orthogonal_and_undone(n):
    matrix = torch.randn(3, 2, n, dtype=torch.float64)
    assert torch.allclose(unrotate(rotate(matrix)), matrix, atol=1e-12)
    assert torch.allclose(rotate(matrix).norm(dim=-1), matrix.norm(dim=-1))


@pytest.mark.parametrize("n", [n for n in SIZES if n < 2000])
def test_rotations_are_the_documented_matrix(n):
    power = n & -n
    odd = n // power
    cosines = scipy.fft.dct(torch.eye(odd).double().numpy(), norm="ortho", axis=0)
    left = torch.from_numpy(cosines) if odd <= 256 else torch.eye(odd, dtype=torch.float64)
    right = torch.from_numpy(scipy.linalg.hadamard(power)).double() / power**0.5
    wanted = _signs(n, torch.float64, torch.device("cpu"))[:, None] * torch.kron(left, right)
    matrix = rotate(torch.eye(n, dtype=torch.float64))
    wanted = wanted if n >= 16 else torch.eye(n, dtype=torch.float64)
    assert torch.allclose(matrix, wanted, atol=1e-12)
    squares = torch.rand(4, n, dtype=torch.float64)
    assert torch.allclose(rotate_squares(squares), squares @ matrix.square(), atol=1e-12)


def test_signs_are_those_of_every_file_written_so_far():
    signs = _signs(4096, torch.float32, torch.device("cpu"))
    assert abs(float(signs.mean())) < 0.05
    bits = bytes((signs < 0).to(torch.uint8).tolist())
    assert hashlib.blake2b(bits, digest_size=8).hexdigest() == "e06a0481e758691a"


def test_rotated_outliers_are_spread():
    rows = torch.randn(8, 64)
    rows[:, 5] *= 50
    kurtosis = rows.pow(4).mean() / rows.square().mean() ** 2
    turned = rotate(rows)
    assert turned.pow(4).mean() / turned.square().mean() ** 2 < kurtosis / 4


@pytest.mark.parametrize(
    "encoding", ["multi_scale", "multi_codebook", "per_row", "tiles", "trellis"]
)
@pytest.mark.parametrize("reorder", ["none", "stored"])
def test_rotation_lowers_the_error_of_outliers_at_equal_bytes(encoding, reorder, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 64))
    with torch.no_grad():
        model[0].weight *= torch.rand(192) ** 4
    errors, sizes = [], []
    for rotation in (None, "hadamard"):
        packed = jlcm.compress(
            model,
            alpha=3.9,
            encoding=jlcm.Encoding(kind=encoding, tile=(16, 64)),
            reorder=reorder,
            rotation=rotation,
            progress=False,
        )
        difference = (packed[0].weight - model[0].weight).detach()
        error = float(difference.norm() / model[0].weight.detach().norm())
        (layer,) = footprint(packed).layers
        assert layer.relative_error == pytest.approx(error, rel=1e-4)
        errors.append(error)
        sizes.append(layer.nbytes)
        path = tmp_path / "packed.safetensors"
        jlcm.save(packed, path)
        assert footprint(path).file_bytes == path.stat().st_size
        loaded = jlcm.load(path, model=copy.deepcopy(model))
        assert torch.equal(loaded[0].weight, packed[0].weight)
        kind = read_header(path)["tensors"]["0.weight"].get("kind")
        assert kind == (None if rotation is None else "rotated")
    assert sizes[0] == sizes[1]
    assert errors[1] < errors[0]


def test_importance_is_that_of_the_weights_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    cost = torch.zeros(32, 64)
    cost[:16] = 1
    options = {"alpha": 7.5, "rotation": "hadamard", "reorder": "none", "progress": False}
    packed = [
        jlcm.compress(model, importance=importance, encoding="multi_codebook", **options)
        for importance in (None, {"0.weight": cost})
    ]
    even, weighted = (
        (cost * (p[0].weight - model[0].weight).square()).sum().item() for p in packed
    )
    assert weighted <= even


def test_decoding_is_in_float32_whatever_the_context():
    rows = torch.randn(16, 96)
    with torch.inference_mode():
        wanted = unrotate(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(unrotate(rows), wanted)
    trained = rows.clone().requires_grad_()
    unrotate(trained).square().sum().backward()
    assert torch.allclose(trained.grad, 2 * rows, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 96), (2, 5, 96), (96,), (0, 96)])
def test_few_inputs_of_linear_layers_are_rotated_in_place_of_the_weight(shape, dtype, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64))
    packed = jlcm.compress(model, alpha=5.33, rotation="hadamard", progress=False).to(dtype)
    inputs, many = torch.randn(shape).to(dtype), torch.randn(64, 96).to(dtype)
    weight, bias = packed[0].weight, packed[0].bias
    assert torch.equal(packed(many), nn.functional.linear(many, weight, bias))
    wanted = nn.functional.linear(inputs, weight, bias)
    monkeypatch.setattr("jlcm.packed.unrotate", None)
    found = packed(inputs)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(found, wanted, atol=tolerance)


def test_sums_are_those_of_the_rotated_inputs():
    torch.manual_seed(0)
    plain, turned = (Moments.zeros(2, 3, 12, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        x, y = torch.randn(2, 12, 50), torch.randn(2, 3, 50)
        plain.add(x, y)
        turned.add(rotate(x.mT).mT, y)
    turned.check()
    found = plain.rotated()
    for name in ("gram", "cross", "energy", "inputs", "outputs"):
        assert torch.allclose(getattr(found, name), getattr(turned, name), atol=1e-3)
    assert found.count == turned.count


@pytest.mark.parametrize(
    "options",
    [{}, {"row_scale": False}, {"kind": "proximal", "activation": True, "iterations": 30}],
)
def test_learning_in_the_rotated_basis_reports_the_errors_of_the_network(options):
    reference, calibration = network(), images()
    common = {"alpha": 5.33, "rotation": "hadamard", "progress": False}
    packed = jlcm.compress(reference, calibration=calibration, learn=Learn(**options), **common)
    start = jlcm.compress(reference, **common)
    assert [layer.nbytes for layer in footprint(packed).layers] == [
        layer.nbytes for layer in footprint(start).layers
    ]
    weights = [held for _, held in stored_tensors(packed) if isinstance(held, PackedWeight)]
    assert weights and all(held.rotated for held in weights)
    assert all(result.kept == "learned" for result in packed.learning)
    last = packed.learning[-1]
    every = round(1 / Learn().held_out)
    held = calibration[torch.arange(len(calibration)) % every == every - 1]
    with torch.no_grad():
        goal = reference(held)
        error = (packed(held) - goal).square().sum() / (goal - goal.mean(0)).square().sum()
        new = images(seed=5)
        goal = reference(new)
        errors = [float((p(new) - goal).square().mean()) for p in (start, packed)]
    assert last.after == pytest.approx(float(error), rel=1e-3)
    assert errors[1] < 0.5 * errors[0]


def test_linear_layers_that_rotate_few_inputs_are_learned():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    packed = jlcm.compress(
        reference,
        alpha=7.5,
        rotation="hadamard",
        calibration=torch.randn(40, 32),  # fewer values than a weight has
        learn=Learn(),
        progress=False,
    )
    assert len(packed.learning) == 2
    assert all(math.isfinite(result.before) for result in packed.learning)
    assert packed.learning[1].kept == "learned"


def test_rotation_helps_least_squares_codebooks():
    reference, new = network(), images(seed=5)
    errors = []
    for rotation in (None, "hadamard"):
        packed = jlcm.compress(
            reference,
            alpha=5.33,
            rotation=rotation,
            calibration=images(256),
            learn=Learn(),
            progress=False,
        )
        with torch.no_grad():
            errors.append(float((packed(new) - reference(new)).square().mean()))
    assert errors[1] < errors[0]


def test_trained_copies_decode_and_receive_gradients_in_the_basis_of_the_weights():
    reference = network()
    packed = jlcm.compress(reference, alpha=5.33, rotation="hadamard", progress=False)
    twin, trainables = trainable_copy(packed, reference, codes=True)
    weight, stored = trainables["head.weight"]
    assert isinstance(weight, TrainableWeight)
    assert torch.allclose(weight(), packed.head.weight, atol=1e-6)
    direction = torch.randn_like(reference.head.weight)
    (weight() * direction).sum().backward()
    step = 1e-3 * torch.randn_like(weight.codebooks)
    before = weight().detach()
    with torch.no_grad():
        weight.codebooks += step
    change = ((weight() - before) * direction).sum()
    assert change.item() == pytest.approx((weight.codebooks.grad * step).sum().item(), rel=1e-2)
    # Latent values start at the rotated original weights, inside the cells.
    scales = stored.scale_per_weight()
    order = stored.row_order()
    rows = rotate(reference.head.weight.detach().view(stored.rows, -1))
    values = (rows if order is None else rows[order]).reshape(-1) / scales
    near = (weight.latent - values).abs() < 1e-5
    assert near.float().mean() > 0.9


def test_estimated_distortions_are_those_of_rotated_weights():
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    weight *= torch.rand(128) ** 4
    even = torch.ones_like(weight)
    errors = [float((_clustered(weight, even, 3, r) - weight).norm()) for r in (False, True)]
    assert errors[1] < errors[0]


def test_unexplained_part_is_that_of_the_rotated_inputs():
    torch.manual_seed(0)
    mixing = torch.randn(16, 16) @ torch.diag(torch.rand(16) ** 2)
    inputs = torch.randn(4000, 16) @ mixing
    model = nn.Sequential(nn.Linear(16, 4))
    weights = {"0.weight": model[0].weight}
    found = unexplained_parts(model, weights, [inputs], rotated=True)["0.weight"]
    turned = unexplained_parts(model, weights, [rotate(inputs)])["0.weight"]
    assert found == pytest.approx(turned, rel=1e-4)


def test_unknown_rotations_list_those_that_exist():
    with pytest.raises(Invalid, match="rotation='fourier' is not one of hadamard"):
        jlcm.compress(network(), rotation="fourier")
