"""Block-wise reconstruction: errors that are true and never rise, same bytes, resuming."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise
from torch import nn

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.learning import blocks as module
from jlcm.learning.blocks import Blocks, learn_blocks
from jlcm.packed import PackedWeight

COUNT = 80
HELD = torch.arange(COUNT) % 4 == 3
FAST = {"epochs": 3, "batch_size": 16, "lr": 3e-3, "lr_vectors": 3e-3, "held_out": 0.25}
NAMES = [
    "stem.weight .. blocks.0.conv2.weight",
    "blocks.1.conv1.weight .. blocks.1.conv2.weight",
    "head.weight .. head.weight",
]


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x):
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self, c=12, branch=False):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(c)
        self.blocks = nn.Sequential(Residual(c), Residual(c))
        self.head = nn.Linear(c, 10)
        self.branch = branch

    def forward(self, x):
        if self.branch and x.sum() > 1e9:  # torch.fx cannot trace this
            return x
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))


class Joined(nn.Module):
    """Tokens of all inputs in one dimension."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())
        self.last = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.last(self.layers(x.flatten(0, 1))).unflatten(0, (-1, 5))


def network(**options):
    torch.manual_seed(0)
    model = Net(**options).train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
    for seed in range(10):
        model(images(32, seed))
    return model.eval().requires_grad_(False)


def chain(*, inplace):
    torch.manual_seed(0)
    channels, layers = (3, 12, 12, 12, 12), []
    for a, b in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(a, b, 3), nn.SiLU(inplace)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10)).eval().requires_grad_(False)


def images(n=COUNT, seed=1):
    x = torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return x + F.avg_pool2d(x, 3, 1, 1) * 3  # neighbouring pixels correlate


def pack(model, **options):
    options = {"alpha": 7.5, "init": "kmeans", "reorder": "none"} | options
    return jlcm.compress(model, progress=False, **options)


def learn(packed, model, x, folder=None, seed=0, **options):
    given = Blocks(**{**FAST, "precision": "fp32", **options})
    return learn_blocks(packed, model, x, options=given, seed=seed, progress=False, folder=folder)


def state(packed):
    return {
        f"{name}:{key}": tensor.clone()
        for name, held in stored_tensors(packed)
        for key, tensor in held.named_buffers()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def outputs(model, x):
    """Of both residual blocks and the head."""
    first = model.blocks[0](F.relu(model.bn(model.stem(x))))
    second = model.blocks[1](first)
    return first, second, model.head(second.mean((2, 3)))


def errors(packed, model, x):
    """Squared error of the held-out inputs over the variance of all, block by block."""
    pairs = zip(outputs(packed, x), outputs(model, x), strict=True)
    return [float((z - y)[HELD].square().mean() / y.var(correction=0)) for z, y in pairs]


@pytest.mark.parametrize(
    "encoding",
    [
        "multi_scale",
        "multi_codebook",
        "per_row",
        jlcm.Encoding(kind="tiles", tile=(4, 16)),
        jlcm.Encoding(fold_bn=True),
        jlcm.Encoding(first_last="int8"),
    ],
)
@pytest.mark.parametrize("lr_codes", [0.0, 0.02])
def test_errors_fall_at_equal_bytes_whatever_the_encoding(encoding, lr_codes):
    model, x, new = network(), images(), images(64, 9)
    alpha = 3.5 if encoding == "per_row" or getattr(encoding, "kind", "") == "tiles" else 7.5
    packed = pack(model, encoding=encoding, alpha=alpha)
    before, start = jlcm.footprint(packed), state(packed)
    error = (packed(new) - model(new)).square().mean()
    results = learn(packed, model, x, lr_codes=lr_codes)
    after, end = jlcm.footprint(packed), state(packed)
    assert (packed(new) - model(new)).square().mean() < error
    assert results and all(r.after <= r.before for r in results)
    assert sum(r.after for r in results) < sum(r.before for r in results)
    assert before.as_dict() == after.as_dict()
    assert [layer.nbytes for layer in before.layers] == [layer.nbytes for layer in after.layers]
    assert {k: (t.shape, t.dtype) for k, t in start.items()} == {
        k: (t.shape, t.dtype) for k, t in end.items()
    }
    moved = {key.rpartition(":")[2] for key in end if not torch.equal(start[key], end[key])}
    assert ("codes" in moved) == (lr_codes > 0)
    assert {"codebooks", "values"} <= moved and "order" not in moved
    for name, held in stored_tensors(packed):
        if isinstance(held, PackedWeight):
            assert (held.codebooks.diff(dim=1) >= 0).all(), name


def test_blocks_end_where_one_tensor_is_live():
    model, x = network(), images()
    assert [r.name for r in learn(pack(model), model, x, epochs=1)] == NAMES
    # A residual block is never cut, although each of its layers would do.
    single = [r.name for r in learn(pack(model), model, x, epochs=1, weights=1)]
    assert single == [
        "stem.weight .. stem.weight",
        "blocks.0.conv1.weight .. blocks.0.conv2.weight",
        *NAMES[1:],
    ]
    joined = [r.name for r in learn(pack(model), model, x, epochs=1, weights=4)]
    assert joined == ["stem.weight .. blocks.1.conv2.weight", NAMES[2]]
    whole = [r.name for r in learn(pack(model), model, x, epochs=1, weights=100)]
    assert whole == ["stem.weight .. head.weight"]


@pytest.mark.parametrize("lr_codes", [0.0, 0.02])
def test_reported_errors_are_those_of_the_network_so_far(lr_codes):
    model, x = network(), images()
    packed, start = pack(model), pack(model)
    results = learn(packed, model, list(x.split(20)), lr_codes=lr_codes)
    after = errors(packed, model, x)
    hybrid, before = copy.deepcopy(start), []
    for index in range(3):
        before.append(errors(hybrid, model, x)[index])
        if index == 0:
            hybrid.stem, hybrid.bn = packed.stem, packed.bn
        if index < 2:
            hybrid.blocks[index] = packed.blocks[index]
    assert [r.before for r in results] == pytest.approx(before, rel=1e-4)
    assert [r.after for r in results] == pytest.approx(after, rel=1e-4)
    for result in results:
        assert len(result.curve) == FAST["epochs"] and all(map(math.isfinite, result.curve))
        assert (result.best_epoch == 0) == (result.after == result.before)
        assert result.seconds > 0


def test_held_out_inputs_are_not_trained_on(monkeypatch):
    loss, seen = module._Block._loss, {True: [], False: []}

    def spy(self, number, rows, *, train):
        seen[train].append((number, rows.tolist()))
        return loss(self, number, rows, train=train)

    monkeypatch.setattr(module._Block, "_loss", spy)
    model = network()
    learn(pack(model), model, images(), epochs=2)
    assert len(seen[True]) == 3 * 2 * 5 and len(seen[False]) == 3 * 3 * 5
    for train, calls in seen.items():
        for number, rows in calls:
            assert rows == (HELD != train)[16 * number :][:16].tolist()


def test_state_before_is_kept_when_nothing_improves():
    model, x = network(), images()
    packed = pack(model)
    start = state(packed)
    results = learn(packed, model, x, lr=0.9, lr_vectors=0.9, epochs=1)
    assert [r.best_epoch for r in results] == [0, 0, 0]
    assert all(r.after == r.before for r in results)
    assert same(start, state(packed))


def test_rates_decide_what_is_trained():
    model, x = network(), images()
    for options, kinds in (
        ({"lr": 0.0, "lr_vectors": 0.0}, set()),
        ({"lr": 0.0}, {"values"}),
        ({"lr_vectors": 0.0}, {"codebooks", "scales"}),
        ({"lr": 0.0, "lr_vectors": 0.0, "lr_codes": 0.05}, {"codes"}),
    ):
        packed = pack(model)
        start = state(packed)
        learn(packed, model, x, **options)
        end = state(packed)
        assert {k.rpartition(":")[2] for k in end if not torch.equal(start[k], end[k])} == kinds


def test_reference_is_left_alone_and_seeds_decide():
    model, x = network(), images()
    kept = copy.deepcopy(model.state_dict())
    first, second, other = (pack(model) for _ in range(3))
    learn(first, model, x, lr_codes=0.02)
    learn(second, model, list(x.split(16)), lr_codes=0.02)
    learn(other, model, x, lr_codes=0.02, seed=4)
    assert same(state(first), state(second))
    assert not same(state(first), state(other))
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("lr_codes", [0.0, 0.02])
def test_interrupted_run_resumes_with_identical_results(lr_codes, tmp_path, monkeypatch):
    model, x = network(), images()
    whole, broken, resumed = (pack(model) for _ in range(3))
    expected = learn(whole, model, x, tmp_path / "whole", lr_codes=lr_codes)
    train, calls = module._Block.train, []

    def fails(self):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return train(self)

    monkeypatch.setattr(module._Block, "train", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        learn(broken, model, x, tmp_path / "cut", lr_codes=lr_codes)
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == 2
    results = learn(resumed, model, x, tmp_path / "cut", lr_codes=lr_codes)
    assert len(calls) == 4  # the last block only
    assert same(state(whole), state(resumed))
    for a, b in zip(expected, results, strict=True):
        a.seconds = b.seconds = 0.0
        b.restored = False
        assert a == b


def test_other_runs_share_a_folder_and_damaged_files_are_refused(tmp_path):
    model, x = network(), images()
    learn(pack(model), model, x, tmp_path, epochs=1)
    others = [
        (7.5, x, {"epochs": 2}),
        (7.5, x, {"epochs": 1, "seed": 1}),
        (7.5, x, {"epochs": 1, "lr": 1e-3}),
        (7.5, x + 1, {"epochs": 1}),
        (5.33, x, {"epochs": 1}),
    ]
    for alpha, inputs, options in others:
        shared, alone = (pack(model, alpha=alpha) for _ in range(2))
        results = learn(shared, model, inputs, tmp_path, **options)
        learn(alone, model, inputs, **options)
        assert same(state(shared), state(alone)) and not any(r.restored for r in results)
    assert all(r.restored for r in learn(pack(model), model, x, tmp_path, epochs=1))
    damaged, other, *_ = sorted(
        tmp_path.rglob("0001.safetensors"), key=lambda path: path.stat().st_mtime
    )
    content = damaged.read_bytes()
    damaged.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="belongs to a run with other options, weights or"):
        learn(pack(model), model, x, tmp_path, epochs=1)
    damaged.write_bytes(content)
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(ValueError, match="0001.safetensors is damaged"):
        learn(pack(model), model, x, tmp_path, epochs=1)


def test_compression_learns_blocks_after_layers(tmp_path):
    model, x = network(), images()
    options = Blocks(**FAST, precision="fp32")
    layers = jlcm.Learn(rounds=1, sweeps=1, held_out=0.25, forward_batch=16)
    packed = pack(model, calibration=x, learn=layers, blocks=options, folder=tmp_path)
    expected = pack(model, calibration=x, learn=layers)
    results = learn_blocks(expected, copy.deepcopy(model), x, options=options, progress=False)
    assert same(state(packed), state(expected))
    assert [r.name for r in packed.learning[-3:]] == [r.name for r in results] == NAMES
    assert len(packed.learning) == 9  # after six layers
    assert len(list((tmp_path / "blocks").rglob("*.safetensors"))) == 3
    jlcm.save(packed, tmp_path / "m.safetensors")
    loaded = jlcm.load(tmp_path / "m.safetensors", model=network())
    assert torch.equal(loaded(x), packed(x))


def test_calibration_inputs_and_networks_that_do_not_do():
    model, x = network(), images()
    packed = pack(model)
    start = state(packed)
    with pytest.raises(ValueError, match="cannot be traced into blocks"):
        learn(pack(network(branch=True)), network(branch=True), x)
    with pytest.raises(ValueError, match="calibration set is empty"):
        learn(packed, model, [])
    with pytest.raises(ValueError, match="too few"):
        learn(packed, model, x[:3])
    poisoned = x.clone()
    poisoned[5, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        learn(packed, model, poisoned)
    assert same(start, state(packed))
    broken = network()
    with torch.no_grad():
        broken.blocks[0].conv1.weight[0] = math.inf
    with pytest.raises(ValueError, match="loss of stem.weight .* is NaN or infinite"):
        learn(packed, broken, x)


def test_options_out_of_range_are_refused():
    for name, values in {
        "epochs": (0, -1),
        "batch_size": (0,),
        "weights": (0,),
        "lr": (-1e-3, 1.0, math.nan),
        "lr_vectors": (-1e-3, 1.0),
        "lr_codes": (-1e-3, 2.0),
        "held_out": (0.0, 1.0),
        "memory": (-1,),
        "precision": ("fp8",),
    }.items():
        for value in values:
            with pytest.raises(Invalid, match=name):
                Blocks(**{name: value})


def test_blocks_need_calibration_inputs():
    with pytest.raises(Invalid, match="calibration"):
        pack(network(), blocks=Blocks())


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_place_do_not_change_what_is_kept(inplace):
    model, x = chain(inplace=inplace), images()
    packed = pack(model)
    last = learn(packed, model, x, lr=0.0, lr_vectors=0.0, epochs=1)[-1]
    with torch.no_grad():
        y, z = model(x), packed(x)
    direct = float((z - y)[HELD].square().mean() / y.var(correction=0))
    assert last.before == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("memory", [0, 150_000])
def test_memory_limit_changes_nothing(memory):
    model, x = network(), images()
    whole, tight = pack(model), pack(model)
    learn(whole, model, x)
    learn(tight, model, x, memory=memory)
    assert same(state(whole), state(tight))


def test_batches_of_held_out_inputs_only_are_not_trained_on():
    model, x = network(), images(76)
    results = learn(pack(model), model, [x[:75], x[75:]], batch_size=25)
    assert all(r.after <= r.before for r in results)


def test_shared_weights_resume_with_identical_results(tmp_path):
    torch.manual_seed(0)
    model, x = Tied().eval().requires_grad_(False), images(COUNT)[:, 0, :8, :2].flatten(1)
    whole, resumed = pack(model, alpha=4), pack(model, alpha=4)
    learn(whole, model, x, tmp_path, weights=1)
    next(tmp_path.rglob("0002.safetensors")).unlink()
    learn(resumed, model, x, tmp_path, weights=1)
    assert same(state(whole), state(resumed))


def test_blocks_between_joined_tokens_are_left_or_learned():
    torch.manual_seed(0)
    model = Joined().eval().requires_grad_(False)
    packed = pack(model, alpha=4)
    for result in learn(packed, model, torch.randn(COUNT, 5, 16)):
        assert result.after <= result.before


def test_a_norm_that_holds_a_part_of_the_weight_belongs_to_the_block():
    torch.manual_seed(0)
    layers = [
        layer
        for width in (3, 16, 16, 16)
        for layer in (nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x = randomise(model).eval() and images()
    options = {"alpha": 5.33, "calibration": x, "learn": jlcm.Learn(), "progress": False}
    before = jlcm.compress(model, **options)
    after = jlcm.compress(model, blocks=jlcm.Blocks(epochs=1), **options)
    blocks = [result for result in after.learning if " .. " in result.name]
    assert [block.name for block in blocks] == [
        "0.weight .. 3.weight",
        "6.weight .. 9.weight",
        "14.weight .. 14.weight",
    ]
    # Layers have been learned up to a scale for each row, which only the norm takes away.
    assert all(block.before < 0.1 for block in blocks)
    new = images(64, 9)
    with torch.no_grad():
        errors = [float((p(new) - model(new)).square().mean()) for p in (before, after)]
    assert errors[1] < 1.2 * errors[0]
