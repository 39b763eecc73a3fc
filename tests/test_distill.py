"""End-to-end distillation: exact gradients, never worse, reproducible, same bytes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import jlcm
from jlcm.config import Encoding, Invalid
from jlcm.layers import HalfTensor, stored_tensors
from jlcm.learning import distill as module
from jlcm.learning.distill import Distill, distill
from jlcm.learning.forward import DepthwiseGradients, augment
from jlcm.learning.trainable import TrainableWeight, trainable_copy
from jlcm.packed import PackedWeight, group_sizes

torch.set_num_threads(1)
FAST = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "lr_vectors": 1e-2, "holdout": 0.25}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model[-1].weight.mul_(8)  # outputs that differ from input to input
    return model.eval().requires_grad_(False)


def images(count: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def compressed(reference: nn.Module, alpha: float = 7.5, encoding="multi_scale") -> nn.Module:
    return jlcm.compress(
        reference, alpha=alpha, init="kmeans", encoding=encoding, reorder="none", progress=False
    )


def run(packed, reference, inputs=None, folder=None, seed=0, **options):
    return distill(
        packed,
        reference,
        images() if inputs is None else inputs,
        options=Distill(**{**FAST, "precision": "fp32", **options}),
        seed=seed,
        device="cpu",
        progress=False,
        folder=folder,
    )


def state(packed: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{part}": buffer.clone()
        for name, stored in stored_tensors(packed)
        for part, buffer in stored.named_buffers(recurse=False)
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def divergence(packed, reference, inputs) -> float:
    """Mean KL from its definition, sum p (log p - log q)."""
    with torch.no_grad():
        p, q = (m(inputs).double().softmax(1) for m in (reference, packed))
    return float((p * (p.log() - q.log())).sum(1).mean())


def dense(parts, codebooks, scales, order):
    """Decode through a one-hot matrix, for autograd."""
    rows, columns, codes, groups, scale_groups = parts
    count = rows * columns
    position = torch.arange(count)
    book = position * groups // count
    weights = F.one_hot(book * codebooks.shape[1] + codes.long(), codebooks.numel()).double()
    values = weights @ codebooks.reshape(-1)
    if scales is not None:
        values = values * scales[position * scale_groups // count]
    values = values.view(rows, columns)
    return values if order is None else values[order.argsort()]


@pytest.mark.parametrize(
    "groups, scale_groups, ordered", [(1, 5, True), (7, 0, False), (3, 4, True)]
)
def test_gradients_equal_those_of_a_dense_decode(groups, scale_groups, ordered):
    rows, columns, bits = 6, 11, 3
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (rows * columns,), generator=g)
    codebooks = torch.randn(groups, 8, generator=g).sort(1).values.half()
    scales = torch.rand(scale_groups, generator=g).half() if scale_groups else None
    order = torch.randperm(rows, generator=g) if ordered else None
    packed = PackedWeight.encode(
        codes, codebooks, shape=(rows, columns), bits=bits, scales=scales, order=order
    )
    trainable = TrainableWeight(packed, None, codes=True)
    upstream = torch.randn(rows, columns, generator=g)
    decoded = trainable()
    decoded.backward(upstream)

    books = codebooks.double().requires_grad_()
    factors = None if scales is None else scales.double().requires_grad_()
    expected = dense((rows, columns, codes, groups, scale_groups), books, factors, order)
    expected.backward(upstream.double())
    assert torch.allclose(decoded.double(), expected, atol=1e-6)
    assert torch.equal(decoded, packed())
    assert torch.allclose(trainable.codebooks.grad.double(), books.grad, atol=1e-5)
    if scales is not None:
        assert torch.allclose(trainable.scales.grad.double(), factors.grad, atol=1e-5)
    # Straight through: the latent value receives what its codeword would, if it alone used it.
    reordered = upstream if order is None else upstream[order]
    factor = 1.0
    if scales is not None:
        sizes = group_sizes(rows * columns, scale_groups)
        factor = scales.float().repeat_interleave(sizes)
    assert torch.allclose(trainable.latent.grad, reordered.reshape(-1) * factor, atol=1e-6)


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "tiles"])
def test_untouched_copy_decodes_and_writes_the_same_bytes(kind):
    reference = network()
    encoding = Encoding(kind=kind, tile=(4, 16))
    packed = compressed(reference, alpha=2.0 if kind == "tiles" else 5.33, encoding=encoding)
    before = state(packed)
    twin, trainables = trainable_copy(packed, reference, codes=True)
    x = images(4)
    assert torch.equal(twin(x), packed(x))
    for trainable, stored in trainables.values():
        trainable.project()
        trainable.write(stored)
    assert same(before, state(packed))


def test_latent_values_start_at_the_original_weights_inside_the_cells():
    reference = network()
    packed = compressed(reference)
    _, trainables = trainable_copy(packed, reference, codes=True)
    trainable, stored = trainables["0.weight"]
    original = reference[0].weight.reshape(-1)
    scaled = trainable.latent * stored.scale_per_weight()
    assert torch.isclose(scaled, original, atol=1e-5).float().mean() > 0.95
    unrelated = TrainableWeight(stored, torch.randn(5, 5), codes=True)
    assert torch.equal(unrelated.latent, stored.codeword_per_weight())


def test_latent_values_move_codes_and_codebooks_stay_ascending():
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    packed = PackedWeight.encode(torch.tensor([0, 1, 2, 3]), codebook, shape=(2, 2), bits=2)
    trainable = TrainableWeight(packed, None, codes=True)
    with torch.no_grad():
        trainable.latent.add_(torch.tensor([0.6, 0.4, -0.6, -2.6]))
        trainable.codebooks[0, 3] = 0.9  # crosses its neighbour
    trainable.project()
    assert trainable.codebooks.tolist() == [[-1.0, 0.0, 1.0, 1.0]]
    assert trainable.codes.tolist() == [1, 1, 1, 0]
    assert trainable().flatten().tolist() == [0.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("lr_codes", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook"])
def test_divergence_falls_on_other_inputs_at_equal_bytes(kind, lr_codes, tmp_path):
    reference = network()
    packed = compressed(reference, encoding=kind)
    fresh = images(128, seed=9)
    before, start = divergence(packed, reference, fresh), state(packed)
    shapes = {k: (v.shape, v.dtype) for k, v in start.items()}
    result = run(packed, reference, images(128), lr_codes=lr_codes, epochs=6)
    after = state(packed)
    assert divergence(packed, reference, fresh) < 0.8 * before
    assert result.final_loss < result.initial_loss and len(result.history) == 6
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == shapes
    moved = [not torch.equal(start[k], after[k]) for k in after if k.endswith(":codes")]
    assert any(moved) == (lr_codes > 0) == (result.moved_codes > 0)
    for name, stored in stored_tensors(packed):
        if isinstance(stored, PackedWeight):
            assert (stored.codebooks.diff(dim=1) >= 0).all(), name
    jlcm.save(packed, tmp_path / "m.safetensors")
    loaded = jlcm.load(tmp_path / "m.safetensors", model=network())
    assert torch.equal(loaded(fresh), packed(fresh))


def test_losses_reported_are_those_of_the_network_returned():
    reference, inputs = network(), images()
    packed = compressed(reference)
    held = torch.arange(len(inputs)) % 4 == 3
    before = divergence(packed, reference, inputs[held])
    result = run(packed, reference, inputs)
    assert result.initial_loss == pytest.approx(before, rel=1e-4)
    assert result.final_loss == pytest.approx(divergence(packed, reference, inputs[held]), rel=1e-4)
    best = min(result.history, key=lambda losses: losses[1])
    assert result.history[result.best_epoch - 1] == best


@pytest.mark.parametrize(
    "count, holdout, expected",
    [(10, 0.25, [3, 7]), (20, 0.1, [9, 19]), (7, 0.5, [1, 3, 5]), (5, 0.1, [4]), (2, 0.01, [1])],
)
def test_every_nth_input_is_held_out(count, holdout, expected):
    held, trained = module._split(count, holdout)
    assert held.tolist() == expected
    assert trained.tolist() == [i for i in range(count) if i not in expected]


def test_initial_state_is_kept_when_nothing_improves():
    reference = network()
    packed = compressed(reference)
    before = state(packed)
    result = run(packed, reference, lr=0.9, lr_vectors=0.9, epochs=2)
    assert result.best_epoch == 0 and result.final_loss == result.initial_loss
    assert same(before, state(packed))


@pytest.mark.parametrize(("gains", "kept"), [((0.5, -0.3, 0.0, 0.0), False), ((0.2, 0.1), True)])
def test_a_gain_within_its_standard_error_is_not_kept(monkeypatch, gains, kept):
    reference = network()
    packed = compressed(reference)
    before = state(packed)

    def losses(self):
        changed = not same(before, state(self.packed))
        return 1 - torch.tensor(gains) * changed

    monkeypatch.setattr(module._Run, "_held_out_losses", losses)
    result = run(packed, reference, epochs=1)
    assert (result.best_epoch == 1) == kept == (result.final_loss < result.initial_loss)
    assert same(before, state(packed)) != kept


def test_file_that_the_network_was_loaded_from_stays_as_it_is(tmp_path):
    reference, path = network(), tmp_path / "m.safetensors"
    jlcm.save(compressed(reference), path)
    content = path.read_bytes()
    loaded, fresh = jlcm.load(path, model=network()), compressed(reference)
    run(loaded, reference, lr_codes=0.02)
    run(fresh, reference, lr_codes=0.02)
    assert path.read_bytes() == content  # although its tensors are mapped
    assert same(state(loaded), state(fresh))


def test_zero_epochs_change_nothing():
    reference = network()
    packed = compressed(reference)
    before = state(packed)
    assert run(packed, reference, epochs=0).history == []
    assert same(before, state(packed))


def test_reference_is_left_alone_and_seeds_decide():
    reference = network()
    kept = copy.deepcopy(reference.state_dict())
    first, second, other = (compressed(reference) for _ in range(3))
    run(first, reference, lr_codes=0.02, seed=3)
    run(second, reference, list(images().split(10)), lr_codes=0.02, seed=3)
    run(other, reference, lr_codes=0.02, seed=4)
    assert same(state(first), state(second))
    assert not same(state(first), state(other))
    assert same(kept, reference.state_dict())


def test_interrupted_run_resumes_to_the_same_result(tmp_path, monkeypatch):
    reference = network()
    whole = compressed(reference)
    expected = run(whole, reference, lr_codes=0.02, folder=tmp_path / "whole")

    packed = compressed(reference)
    before = state(packed)
    save = module.save_part

    def stop_after_first(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_part", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        run(packed, reference, lr_codes=0.02, folder=tmp_path / "cut")
    assert same(before, state(packed))  # so that the same call can be made again
    monkeypatch.undo()
    epochs = []

    def counted(*args, **options):
        epochs.append(1)
        return augment(*args, **options)

    monkeypatch.setattr(module, "augment", counted)
    assert run(packed, reference, lr_codes=0.02, folder=tmp_path / "cut") == expected
    assert same(state(whole), state(packed))
    assert len(epochs) == 2 * 3  # two epochs of 48 inputs by 16
    (kept,) = (path for path in (tmp_path / "cut").rglob("*") if path.is_file())
    assert kept.name == module.CHECKPOINT and load_file(kept)


def test_other_runs_share_a_folder_and_damaged_files_are_refused(tmp_path):
    reference = network()
    run(compressed(reference), reference, epochs=1, folder=tmp_path)
    (kept,) = tmp_path.rglob(module.CHECKPOINT)
    others = [(7.5, other) for other in ({"epochs": 2}, {"seed": 1}, {"inputs": images(seed=2)})]
    for alpha, other in [*others, (5.33, {})]:
        shared, alone = (compressed(reference, alpha=alpha) for _ in range(2))
        options = {"epochs": 1, **other}
        result = run(shared, reference, folder=tmp_path, **options)
        assert result == run(alone, reference, **options)
        assert same(state(shared), state(alone))
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        run(compressed(reference), reference, epochs=1, folder=tmp_path)


def test_unusable_arguments_are_refused():
    reference = network()
    packed = compressed(reference)
    before = state(packed)
    with pytest.raises(ValueError, match="only a network that jlcm.compress returned"):
        run(network(), reference)
    for inputs in ([], torch.empty(0, 3, 12, 12), images(1)):
        with pytest.raises(ValueError, match="at least 2 calibration inputs"):
            run(packed, reference, inputs)
    with pytest.raises(ValueError, match="calibration inputs contain NaN"):
        run(packed, reference, images().fill_(float("nan")))
    with pytest.raises(Invalid, match="crop=13 is larger"):
        run(packed, reference, crop=13)
    with pytest.raises(ValueError, match="have shape"):
        run(packed, nn.Sequential(nn.Flatten(), nn.Linear(432, 7)))
    assert same(before, state(packed))


def test_nan_in_training_is_an_error_and_restores_the_network(monkeypatch):
    reference = network()
    packed = compressed(reference)
    before = state(packed)
    monkeypatch.setattr(module, "augment", lambda x, *_, **__: x * float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf in epoch 1"):
        run(packed, reference)
    assert same(before, state(packed))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": -1e-3},
        {"lr_codes": float("nan")},
        {"holdout": 0.0},
        {"holdout": 1.0},
        {"temperature": 0.0},
        {"crop": 0},
        {"zoom": 0.0},
        {"precision": "fp8"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        Distill(**options)


def test_windows_and_mirror_images_are_parts_of_the_images():
    x = torch.arange(2 * 5 * 6, dtype=torch.float32).view(2, 1, 5, 6)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        for image, window in zip(x, augment(x, generator, flip=True, crop=4), strict=True):
            candidates = {
                (flip, top, left): source[:, top : top + 4, left : left + 4]
                for flip, source in ((False, image), (True, image.flip(-1)))
                for top in range(2)
                for left in range(3)
            }
            found = [key for key, part in candidates.items() if torch.equal(part, window)]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 12
    tokens = torch.arange(6).view(2, 3)
    assert augment(tokens, generator, flip=True, crop=2, zoom=0.5, mix=True) is tokens


def test_zoomed_windows_keep_the_shape_and_lie_within_the_image():
    ramp = torch.arange(16.0).expand(64, 1, 16, 16)  # each column its own value
    generator = torch.Generator().manual_seed(0)
    zoomed = augment(ramp, generator, zoom=0.25)
    assert zoomed.shape == ramp.shape
    assert zoomed.min() >= 0 and zoomed.max() <= 15
    widths = zoomed[:, 0, 0, -1] - zoomed[:, 0, 0, 0]
    assert widths.min() < 9 and widths.max() > 13  # from a half to all of it
    assert torch.equal(augment(ramp, generator, zoom=1.0), ramp)


def test_mixed_images_are_between_two_images():
    values = torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    seen = torch.stack([augment(values, generator, mix=True) for _ in range(50)])
    assert (seen == seen[..., :1, :1, :1]).all()  # one proportion for a whole image
    assert seen.min() >= 0 and seen.max() <= 10
    assert seen.unique().numel() > 50


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 3), (2, 5)])
def test_depthwise_gradients_in_float32_match_a_float32_convolution(stride, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 9).bfloat16().float().requires_grad_()
    weight = torch.randn(8, 1, kernel, kernel).bfloat16().float().requires_grad_()
    options = {"stride": stride, "padding": kernel // 2, "groups": 8}
    expected = F.conv2d(x, weight, **options)
    upstream = torch.randn_like(expected).bfloat16().float()
    gradients = torch.autograd.grad(expected, (x, weight), upstream)
    with torch.autocast("cpu", torch.bfloat16), DepthwiseGradients():
        output = F.conv2d(x, weight, **options)
    assert output.dtype == torch.bfloat16
    found = torch.autograd.grad(output, (x, weight), upstream.bfloat16())
    assert torch.allclose(found[0], gradients[0], rtol=1e-2, atol=1e-2)  # rounded to bf16
    assert torch.allclose(found[1], gradients[1], rtol=1e-5, atol=1e-4)


def test_bf16_training_works_and_shared_tensors_stay_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu()) * 4

    reference = Tied().eval()
    packed = compressed(reference)
    result = run(packed, reference, torch.randn(64, 16), precision="bf16", epochs=8)
    assert result.final_loss < result.initial_loss
    stored = dict(stored_tensors(packed))
    assert stored["first.weight"] is stored["second.weight"]
    assert isinstance(stored["first.bias"], HalfTensor)
