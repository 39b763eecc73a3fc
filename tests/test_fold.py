"""Folding batch norms preserves the function, and refuses where it would not."""

import copy

import pytest
import torch
from folding import Net
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

import jlcm
from jlcm.fold import fold_batch_norms
from jlcm.layers import store_norm


def folded_model(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A folded copy whose folded norms apply nothing any more."""
    model = copy.deepcopy(model)
    names = fold_batch_norms(model)
    for name in names:
        store_norm(model.get_submodule(name), None, dtype=next(model.parameters()).dtype)
    return model, names


def same(model: nn.Module, x: Tensor) -> set[str]:
    folded, names = folded_model(model)
    expected = model(x)
    plain = copy.deepcopy(model)
    fold_batch_norms(plain)
    assert (plain(x) - expected).norm() <= 1e-5 * expected.norm()
    assert (folded(x) - expected).norm() <= 1e-5 * expected.norm()
    return names


def test_function_is_preserved(cnn, images):
    names = same(cnn, images[:, :, :8, :8])
    assert names == {n for n, m in cnn.named_modules() if isinstance(m, nn.BatchNorm2d)}


def conv(biased: bool = False, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, bias=biased, groups=groups)


X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))

CASES = {
    "bias": (Net(lambda m, x: m.n(m.c(x)), c=conv(True), n=nn.BatchNorm2d(4)), {"n"}),
    "depthwise": (Net(lambda m, x: m.n(m.c(x)), c=conv(groups=4), n=nn.BatchNorm2d(4)), {"n"}),
    "keyword": (Net(lambda m, x: m.n(input=m.c(x)), c=conv(), n=nn.BatchNorm2d(4)), {"n"}),
    "without affine": (
        Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.BatchNorm2d(4, affine=False)),
        {"n"},
    ),
    "output used twice": (
        Net(lambda m, x: m.n(y := m.c(x)) + y, c=conv(), n=nn.BatchNorm2d(4)),
        set(),
    ),
    "layer called twice": (
        Net(lambda m, x: m.n(m.c(m.c(x))), c=conv(), n=nn.BatchNorm2d(4)),
        set(),
    ),
    "norm called twice": (
        Net(lambda m, x: m.n(m.c(x)) + m.n(x), c=conv(), n=nn.BatchNorm2d(4)),
        set(),
    ),
    "norm of two layers": (
        Net(lambda m, x: m.n(m.c(x)) + m.n(m.d(x)), c=conv(), d=conv(), n=nn.BatchNorm2d(4)),
        set(),
    ),
    "activation between": (
        Net(lambda m, x: m.n(m.c(x).relu()), c=conv(), n=nn.BatchNorm2d(4)),
        set(),
    ),
    "norm first": (Net(lambda m, x: m.c(m.n(x)), c=conv(), n=nn.BatchNorm2d(4)), set()),
    "statistics of the batch": (
        Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.BatchNorm2d(4, track_running_stats=False)),
        set(),
    ),
    "two norms": (
        Net(lambda m, x: m.k(m.n(m.c(x))), c=conv(), n=nn.BatchNorm2d(4), k=nn.BatchNorm2d(4)),
        {"n"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_safe_is_folded(case):
    model, expected = CASES[case]
    assert same(model, X) == expected


def test_layer_with_a_shared_weight_is_left_alone():
    model = Net(lambda m, x: m.n(m.c(x)) + m.d(x), c=conv(), d=conv(), n=nn.BatchNorm2d(4))
    model.d.weight = model.c.weight
    assert same(model, X) == set()


def test_linear_along_another_dimension_is_left_alone():
    model = Net(lambda m, x: m.n(m.c(x)), c=nn.Linear(5, 7), n=nn.BatchNorm1d(4))
    assert same(model, X[..., 0]) == set()


def test_linear_and_norm_of_features():
    model = Net(lambda m, x: m.n(m.c(x)), c=nn.Linear(4, 7), n=nn.BatchNorm1d(7))
    assert same(model, X[..., 0, 0]) == {"n"}


def test_float64_stays_precise():
    model = Net(lambda m, x: m.n(m.c(x)), c=conv(True), n=nn.BatchNorm2d(4)).double()
    assert same(model, X.double()) == {"n"}


def test_untraceable_network_is_an_error():
    model = Net(lambda m, x: m.n(m.c(x)) if x.sum() > 0 else x, c=conv(), n=nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="torch.fx can trace"):
        jlcm.compress(model, alpha=2.5, encoding=jlcm.Encoding(fold_bn=True), progress=False)


@pytest.mark.parametrize("fold", [False, True])
def test_compressed_network_stores_what_it_needs(cnn, images, fold):
    x = images[:, :, :8, :8]
    packed = jlcm.compress(
        cnn, alpha=2.05, init="kmeans", encoding=jlcm.Encoding(fold_bn=fold), progress=False
    )
    expected = cnn(x)
    assert (packed(x) - expected).norm() <= 0.05 * expected.norm()
    norms = [m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)]
    stored = sum(b.numel() * b.element_size() for m in norms for b in m.buffers())
    channels = sum(m.num_features for m in norms)
    assert stored == (0 if fold else 2 * 2 * channels)
    other = jlcm.footprint(packed).other
    # A folded norm leaves one bias, where the layer had none.
    biases = 2 * (channels + 10) if fold else 2 * (16 + 10)
    assert other == stored + biases
    assert packed.compression.reference_bytes == sum(
        2 * t.numel() for t in [*cnn.parameters(), *cnn.buffers()] if t.is_floating_point()
    )


def test_learning_starts_from_the_folded_network(cnn, images):
    x = images[:, :, :8, :8]
    options = {"alpha": 5.33, "encoding": jlcm.Encoding(fold_bn=True), "progress": False}
    before = jlcm.compress(cnn, **options)(x) - cnn(x)
    learn = jlcm.Learn(held_out=0.25)
    learned = jlcm.compress(cnn, calibration=x, learn=learn, **options)
    assert (learned(x) - cnn(x)).norm() < before.norm()
    assert any(result.kept == "learned" for result in learned.learning)


def test_original_is_untouched(cnn):
    before = {n: t.clone() for n, t in cnn.state_dict().items()}
    jlcm.compress(
        cnn, alpha=6.0, init="random", encoding=jlcm.Encoding(fold_bn=True), progress=False
    )
    assert all(torch.equal(t, before[n]) for n, t in cnn.state_dict().items())


def test_layer_that_standardises_its_weight_is_left_alone():
    model = Net(lambda m, x: m.n(m.c(x)), c=ScaledStdConv2d(4, 4, 3), n=nn.BatchNorm2d(4))
    model.n.running_var.fill_(4)
    assert same(model, X) == set()


def test_layer_that_pads_its_inputs_is_folded():
    model = Net(lambda m, x: m.n(m.c(x)), c=Conv2dSame(4, 4, 3, stride=2), n=nn.BatchNorm2d(4))
    assert same(model, X) == {"n"}
