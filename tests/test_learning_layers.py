"""Layer-wise learning of whole networks: bytes, resuming, held-out acceptance, errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import ScaledStdConv2d
from torch import nn

import jlcm
from jlcm.layers import stored_tensors
from jlcm.learning import calibration as module
from jlcm.learning import sequential
from jlcm.learning.calibration import Calibration
from jlcm.learning.options import Learn
from jlcm.learning.sequential import learn_layers
from jlcm.packed import PackedWeight


class Block(nn.Module):
    """A depthwise-separable block with a skip connection."""

    def __init__(self, c, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
        self.bn1 = norm(c)
        self.conv2 = nn.Conv2d(c, c, 1, bias=False)
        self.bn2 = norm(c)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, c=16, branch=False, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, stride=2, padding="valid", bias=True)
        self.bn = norm(c)
        self.block = Block(c, norm)
        self.grouped = nn.Conv2d(c, 24, 3, dilation=2, padding=2, groups=4)
        self.act = nn.ReLU()
        self.head = nn.Linear(24, 10)
        self.branch = branch

    def forward(self, x):
        if self.branch and x.sum() > 1e9:  # torch.fx cannot trace this
            return x
        x = self.block(self.bn(self.stem(x)))
        return self.head(self.act(self.grouped(x)).mean((2, 3)))


def network(**options):
    torch.manual_seed(0)
    model = Net(**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    model.train()
    for _ in range(20):
        model(images(32))
    return model.eval().requires_grad_(False)


def images(n, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 13, 13, generator=generator)
    return x + F.avg_pool2d(x, 3, 1, 1) * 3  # neighbouring pixels correlate


def pack(model, **options):
    options = {"alpha": 5.33, "encoding": "multi_scale", "reorder": "none"} | options
    return jlcm.compress(model, progress=False, **options)


def stored_bytes(model):
    return [
        (name, key, tuple(t.shape), t.dtype)
        for name, held in stored_tensors(model)
        for key, t in held.named_buffers()
    ]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def error(packed, model, x):
    return float((packed(x) - model(x)).square().sum() / model(x).var(0).sum() / len(x))


OPTIONS = Learn(rounds=2, sweeps=1, iterations=40, polish=1, positions=30, forward_batch=16)


def learn(packed, model, x, options=OPTIONS, **rest):
    return learn_layers(packed, model, x, options=options, progress=False, **rest)


def with_(**changes):
    return Learn(**{**{f: getattr(OPTIONS, f) for f in OPTIONS.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    "encoding",
    [
        "multi_scale",
        "multi_codebook",
        "per_row",
        jlcm.Encoding(kind="tiles", tile=(4, 8)),
        jlcm.Encoding(kind="multi_scale", fold_bn=True),
        jlcm.Encoding(kind="multi_scale", first_last="int8"),
    ],
)
def test_every_encoding_improves_on_new_inputs_at_equal_bytes(encoding):
    model = network()
    alpha = 4.5 if encoding == "per_row" else 5.33
    packed = pack(model, encoding=encoding, alpha=alpha)
    if isinstance(encoding, jlcm.Encoding) and encoding.kind == "tiles":
        packed = pack(model, encoding=encoding, alpha=3.5)
    before, layout, new = error(packed, model, images(64, 9)), stored_bytes(packed), images(64, 9)
    results = learn(packed, model, images(80, 1))
    assert stored_bytes(packed) == layout
    assert error(packed, model, new) < min(0.7 * before, 0.5)
    for result in results:
        assert result.after <= result.before
        assert (result.kept == "initialisation") == bool(result.note)


def test_stored_order_is_respected():
    model = network()
    packed = pack(model, reorder="stored", alpha=4.1, encoding="multi_scale")
    orders = [h.order for _, h in stored_tensors(packed) if isinstance(h, PackedWeight)]
    assert any(order is not None for order in orders)
    before = error(packed, model, images(64, 9))
    learn(packed, model, images(80, 1))
    assert error(packed, model, images(64, 9)) < 0.7 * before


@pytest.mark.parametrize("kind", ["none", "codebook", "joint", "proximal", "lnq"])
def test_every_kind_improves_and_never_worsens_a_layer(kind):
    model = network()
    packed = pack(model, alpha=7.5)
    before = error(packed, model, images(64, 9))
    results = learn(packed, model, images(80, 1), with_(kind=kind))
    assert [r.name for r in results] == [
        "stem.weight", "block.conv1.weight", "block.conv2.weight", "grouped.weight", "head.weight",
    ]  # fmt: skip
    assert all(r.after <= r.before for r in results)
    assert error(packed, model, images(64, 9)) < before


def test_reported_losses_are_those_of_the_network():
    model = network()
    packed = pack(model)
    x = images(40, 1)
    options = with_(positions=10_000, held_out=0.5, flip=False, kind="none", statistics="none")
    result = learn(copy.deepcopy(packed), model, x, options)[0]
    with torch.no_grad():
        y, z = (m.bn(m.stem(x[1::2])) for m in (model, packed))
    direct = (y - z).square().mean((0, 2, 3)).sum() / y.var((0, 2, 3), correction=0).sum()
    assert result.before == pytest.approx(float(direct), rel=1e-3)
    learned = learn(packed, model, x, with_(positions=10_000, held_out=0.5, flip=False))[0]
    with torch.no_grad():
        z = packed.bn(packed.stem(x[1::2]))
    direct = (y - z).square().mean((0, 2, 3)).sum() / y.var((0, 2, 3), correction=0).sum()
    assert learned.kept == "learned"
    assert learned.after == pytest.approx(float(direct), rel=1e-3)


def test_to_make_up_for_all_earlier_errors_overfits_few_inputs():
    error_of = {0.0: [], None: [], 1.0: []}
    for seed in range(4):
        torch.manual_seed(seed)
        layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)
        model = nn.Sequential(*layers).eval().requires_grad_(False)
        few, new = torch.randn(80, 64), torch.randn(1000, 64)
        for part, errors in error_of.items():
            packed = pack(model, alpha=7.5)
            learn(packed, model, few, with_(correction=part))
            errors.append(error(packed, model, new))
    means = {part: sum(errors) / len(errors) for part, errors in error_of.items()}
    assert means[None] < means[1.0]
    assert means[None] < 1.02 * means[0.0]


def test_held_out_inputs_choose_the_damping():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).eval().requires_grad_(False)
    # Few inputs for 64 unknowns a row: a small ridge follows their noise.
    x, found = torch.randn(60, 64), {}
    for ridges in ((0.001,), (3.0,), (0.001, 3.0)):
        packed = pack(model, alpha=7.5)
        found[ridges] = learn(packed, model, x, with_(damping=ridges))[0].after
    assert found[0.001, 3.0] == min(found.values())


def test_moments_are_matched_after_learning():
    model = network()
    packed = pack(model, alpha=7.5)
    x = images(60, 1)
    learn(packed, model, x, with_(positions=10_000))
    keep = torch.arange(60) % 10 != 9
    with torch.no_grad():
        y = model.bn(model.stem(x[keep]))
        z = packed.bn(packed.stem(x[keep]))
    torch.testing.assert_close(z.mean((0, 2, 3)), y.mean((0, 2, 3)), rtol=0.01, atol=5e-3)
    torch.testing.assert_close(z.std((0, 2, 3)), y.std((0, 2, 3)), rtol=0.01, atol=5e-3)


@pytest.mark.parametrize("kind", ["lnq", "proximal"])
def test_same_seed_same_codes_and_memory_limit_changes_nothing(kind):
    model, x = network(), images(48, 1)
    first, second, tight = (pack(model) for _ in range(3))
    learn(first, model, x, with_(kind=kind))
    learn(second, model, list(x.split(16)), with_(kind=kind))
    learn(tight, model, x, with_(kind=kind, memory=0))
    assert same(first, second)
    assert same(first, tight)


def test_networks_that_cannot_be_traced_learn_the_same_as_far_as_no_norm_is_used():
    x = images(32, 1)
    learned = []
    for branch in (False, True):
        model = network(norm=nn.Identity, branch=branch)
        packed = pack(model)
        learned.append((packed, learn(packed, model, x)))
    (traced, expected), (untraced, results) = learned
    assert same(traced, untraced)
    assert [(r.name, r.before, r.after) for r in results] == [
        (r.name, r.before, r.after) for r in expected
    ]


def test_networks_that_cannot_be_traced_improve_with_norms_too():
    # Without the graph the norm after a layer is unknown, and its rows count alike.
    model, x = network(branch=True), images(32, 1)
    packed, new = pack(model), images(64, 9)
    before = error(packed, model, new)
    results = learn(packed, model, x, with_(row_scale=False))
    assert [r.name for r in results][0] == "stem.weight"
    assert all(r.after <= r.before for r in results)
    assert error(packed, model, new) < 0.5 * before


def test_interrupted_run_resumes_with_identical_results(tmp_path, monkeypatch):
    model, x = network(), images(40, 1)
    whole, broken = pack(model), pack(model)
    expected = learn(whole, model, x, folder=tmp_path / "whole")
    original, calls = sequential._fit, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return original(*args)

    monkeypatch.setattr(sequential, "_fit", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        learn(broken, model, x, folder=tmp_path / "broken")
    assert len(list((tmp_path / "broken").rglob("*.safetensors"))) == 2
    resumed = pack(model)
    calls[:] = [1] * 10
    results = learn(resumed, model, x, folder=tmp_path / "broken")
    assert len(calls) == 13
    assert same(whole, resumed)
    for a, b in zip(expected, results, strict=True):
        assert (a.name, a.before, a.after, a.kept) == (b.name, b.before, b.after, b.kept)
    assert [r.restored for r in results[:3]] == [True, True, False]
    damaged = next((tmp_path / "whole").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        learn(pack(model), model, x, folder=tmp_path / "whole")


def test_runs_with_other_options_share_a_folder(tmp_path):
    model, x = network(), images(40, 1)
    alone, first, other, again = (pack(model) for _ in range(4))
    learn(alone, model, x, with_(rounds=3))
    learn(first, model, x, folder=tmp_path)
    results = learn(other, model, x, with_(rounds=3), folder=tmp_path)
    assert same(alone, other) and not any(r.restored for r in results)
    assert all(r.restored for r in learn(again, model, x, folder=tmp_path))
    assert same(first, again)


def test_columns_times_weight_are_the_outputs(monkeypatch):
    model = network()
    packed = pack(model)
    calibration = Calibration(
        model, model, images(20, 3), forward_batch=8, memory=0, positions=7, held_out=0.25,
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert calibration.layers == []  # nothing is packed in the reference itself
    calibration = Calibration(
        packed, model, images(20, 3), forward_batch=8, memory=2**20, positions=7, held_out=0.25,
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert [layer.norm for layer in calibration.layers] == [
        "bn", "block.bn1", "block.bn2", None, None,
    ]  # fmt: skip
    acts = [layer.activation is not None for layer in calibration.layers]
    assert acts == [False, True, False, True, False]
    layer = calibration.layers[0]
    for x, y, held, _ in calibration.pairs(0):
        product = model.stem.weight.reshape(1, 16, -1) @ x
        expected = product + model.stem.bias[:, None]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert x.shape[1:] == (1, 27, 36)  # all positions
        assert held.sum() in (1, 2)
    assert layer.name == "stem.weight"
    with monkeypatch.context() as patch:
        patch.setattr(module, "LEAST_POSITIONS", 1)
        some = [x.shape[1:] for x, *_ in calibration.pairs(0)]
    assert some == [(1, 27, 10)] * 3  # 7 for each of 27 inputs of a neuron, over 20 images
    # Later layers see the compressed network: equal weights give equal inputs there.
    twin = Calibration(
        packed, packed, images(20, 3), forward_batch=8, memory=2**20, positions=7, held_out=0.25,
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    weights = [h for _, h in stored_tensors(packed) if isinstance(h, PackedWeight)]
    for index, weight in enumerate(weights):
        owner = packed.get_submodule(twin.layers[index].module)
        for x, y, *_ in twin.pairs(index):
            product = weight().reshape(x.shape[1], -1, x.shape[2]) @ x
            bias = 0 if owner.bias is None else owner.bias.view(1, x.shape[1], -1, 1)
            torch.testing.assert_close(y, product + bias, rtol=1e-4, atol=1e-4)


def test_attention_projections_are_learned():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    ).eval().requires_grad_(False)  # fmt: skip
    nn.init.normal_(model.heads.head.weight, std=0.1)
    packed = pack(model, alpha=7.5)
    x = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    new = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before, layout = error(packed, model, new), stored_bytes(packed)
    results = learn(packed, model, x)
    names = [r.name for r in results if r.kept == "learned"]
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert f"{attention}.in_proj_weight" in names
    assert f"{attention}.out_proj.weight" in names
    assert len(names) >= 8
    assert stored_bytes(packed) == layout
    # White noise through random weights leaves little to exploit.
    assert error(packed, model, new) < 0.9 * before


def test_masked_attention_is_left_and_says_so():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = layer.self_attn, nn.Linear(16, 8)

        def forward(self, x):
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
            return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])

    model = Masked().eval().requires_grad_(False)
    packed = pack(model, alpha=4)
    results = {r.name: r for r in learn(packed, model, torch.randn(30, 5, 16))}
    assert "self-attention" in results["attention.in_proj_weight"].note
    assert results["attention.in_proj_weight"].kept == "initialisation"
    assert results["head.weight"].kept == "learned"


def test_a_layer_that_standardises_its_weight_keeps_the_initialisation():
    model = nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model = nn.Sequential(*model, nn.Conv2d(8, 8, 3)).eval()
    packed = jlcm.compress(model, alpha=3.9, learn=Learn(), calibration=torch.randn(32, 3, 8, 8))
    standardised, plain = packed.learning
    assert standardised.kept == "initialisation" and "as it is stored" in standardised.note
    assert plain.kept == "learned"


def test_shared_weights_are_learned_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    torch.manual_seed(0)
    model = Twice().eval().requires_grad_(False)
    packed = pack(model, alpha=4)
    results = learn(packed, model, torch.randn(200, 16))
    assert [r.name for r in results] == ["a.weight"]
    assert packed.a.packed["weight"] is packed.b.packed["weight"]


def test_errors_name_the_cause(tmp_path):
    model = network()
    packed = pack(model)
    with pytest.raises(ValueError, match="empty"):
        learn(packed, model, [])
    with pytest.raises(ValueError, match="too few"):
        learn(packed, model, images(5))
    poisoned = images(40)
    poisoned[3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        learn(packed, model, poisoned)
    broken = network()
    with torch.no_grad():
        broken.block.conv1.weight[0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        learn(pack(model), broken, images(40))
    with pytest.raises(ValueError, match="jlcm.compress"):
        learn(model, model, images(40))
    with pytest.raises(ValueError, match="no tensor"):
        learn(packed, nn.Sequential(nn.Linear(2, 2)), images(40))


@pytest.mark.gpu
def test_gpu_learns_as_well():
    model = network()
    cpu, gpu = pack(model), pack(model)
    learn(cpu, model, images(80, 1))
    learn(gpu, copy.deepcopy(model), images(80, 1), device="cuda")
    gpu.cpu()
    assert error(gpu, model, images(64, 9)) < 1.2 * error(cpu, model, images(64, 9))


def test_biases_are_no_part_of_what_weights_aim_at():
    """A bias that is not set anew stays, so the objective is not centred: it must not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(0)) + 1
    changes = {}
    for size in (0.0, 20.0):
        with torch.no_grad():
            model[2].bias.copy_(torch.linspace(-1, 1, 10) * size)
        packed = pack(model, alpha=5.33, encoding="multi_codebook")
        options = Learn(
            kind="codebook", statistics="none", polish=0, final_least_squares=False, iterations=50
        )
        results = learn(packed, model, x, options=options)
        assert [result.kept for result in results] == ["learned"] * 2
        changes[size] = dict(stored_tensors(packed))["2.weight"].codebooks
    assert torch.allclose(changes[0.0], changes[20.0], atol=2e-3)
