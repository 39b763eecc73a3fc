"""Whole networks: goals reached, function kept, models of every make, clear errors."""

import copy
import hashlib
import math

import pytest
import torch
from conftest import compress
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import jlcm
from jlcm.config import ENCODINGS, Invalid
from jlcm.layers import stored_tensors
from jlcm.packed import PackedWeight

NAMES = ("cnn", "vit", "mlp")
PRESETS = [e for e in ENCODINGS if e != "per_row"]


def codes_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, buffer in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(buffer.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dense(packed: nn.Module, original: nn.Module) -> nn.Module:
    """The original class holding the decoded tensors."""
    twin = copy.deepcopy(original).eval()
    with torch.no_grad():
        for name, module in twin.named_modules():
            own = packed.get_submodule(name)
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and getattr(own, key) is not None:
                    tensor.copy_(getattr(own, key))
    return twin


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ENCODINGS)
def test_goal_is_reached_and_function_is_that_of_the_decoded_weights(networks, name, kind):
    model, x = networks[name]
    alpha = 2.2 if kind == "per_row" else 4.5
    packed = compress(model, alpha=alpha, encoding=jlcm.Encoding(kind=kind, tile=(8, 32)))
    assert jlcm.footprint(packed).alpha_layers >= alpha
    assert not list(packed.parameters()) and not packed.training
    reference = dense(packed, model)
    expected = reference(x)
    assert (packed(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.inference_mode():  # attention takes its fused path here
        assert (packed(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


@settings(deadline=None, max_examples=25)
@given(
    st.floats(1, 16, exclude_min=True),
    st.sampled_from(PRESETS),
    st.sampled_from(["auto", "stored", "none"]),
)
def test_alpha_is_never_missed(cnn, alpha, kind, reorder):
    encoding = jlcm.Encoding(kind=kind, tile=(16, 64))
    try:
        packed = compress(cnn, alpha=alpha, init="random", encoding=encoding, reorder=reorder)
    except Invalid as error:
        assert "cannot be reached" in str(error)
        return
    footprint = jlcm.footprint(packed)
    assert footprint.alpha_layers >= alpha
    assert (
        footprint.codes + footprint.codebooks + footprint.scales + footprint.orders
        <= math.floor(footprint.reference_layers / alpha)
    )


@pytest.mark.parametrize("kind", ["multi_scale", "multi_codebook", "auto"])
@pytest.mark.parametrize("alpha", [2.2, 5.33, 7.5])
def test_goal_is_not_overshot_either(kind, alpha):
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 99))
    packed = compress(model, alpha=alpha, encoding=kind)
    assert alpha <= jlcm.footprint(packed).alpha_layers <= 1.02 * alpha


@pytest.mark.parametrize("name", NAMES)
def test_input_model_is_unchanged(networks, name):
    model, x = networks[name]
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    compress(model, example_inputs=x[:1], encoding=jlcm.Encoding(fold_bn=name == "cnn"))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and classes == [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_inplace_uses_the_model_up(mlp):
    model = copy.deepcopy(mlp)
    expected = codes_hash(compress(mlp))
    assert compress(model, inplace=True) is model
    assert codes_hash(model) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", ["hierarchical", "random", "spectral"])
def test_equal_seeds_give_equal_bytes(networks, name, init):
    model, x = networks[name]
    options = {"init": init, "encoding": "auto", "example_inputs": x[:1]}
    one, other = (codes_hash(compress(model, seed=3, **options)) for _ in range(2))
    assert one == other
    if init == "random":
        assert codes_hash(compress(model, seed=4, **options)) != one


def test_global_random_state_is_untouched(cnn, images):
    state = torch.get_rng_state()
    compress(cnn, example_inputs=images[:1, :, :8, :8])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_keep_the_function(networks, name):
    model, x = networks[name]
    expected = model(x)
    output = compress(model, alpha=1.5)(x)
    assert (output - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("reorder", ["propagated", "auto", "stored", "none"])
@pytest.mark.parametrize(
    ("kind", "alpha", "error"), [("multi_scale", 1.5, 0.03), ("multi_codebook", 3.3, 0.3)]
)
def test_reordering_keeps_the_function(cnn, images, reorder, kind, alpha, error):
    x = images[:, :, :8, :8]
    packed = compress(
        cnn, alpha=alpha, reorder=reorder, encoding=kind, init="hierarchical", example_inputs=x[:1]
    )
    expected = cnn(x)
    assert (packed(x) - expected).norm() <= error * expected.norm()
    norm = packed.blocks[0].norm1.weight
    plain = (cnn.blocks[0].norm1.weight / (cnn.blocks[0].norm1.running_var + 1e-5).sqrt()).half()
    moved = not torch.allclose(norm, plain.float(), rtol=1e-2)
    assert moved == (reorder in ("propagated", "auto"))
    if moved:
        assert torch.allclose(norm.sort().values, plain.float().sort().values, rtol=1e-2)
    orders = jlcm.footprint(packed).orders
    assert orders == 0 if reorder in ("propagated", "none") else orders >= 0
    assert not any("not propagated" in note for note in packed.compression.notes)


def test_importance_moves_with_its_rows(cnn, images):
    # Only one row of the expansion matters; wherever it moves, it must be fitted best.
    importance = torch.full_like(cnn.blocks[0].expand.weight, 1e-6)
    importance[5] = 1.0
    options = {"alpha": 6.0, "encoding": jlcm.Encoding(kind="multi_codebook")}
    options |= {"init": "hierarchical", "example_inputs": images[:1, :, :8, :8]}
    name = "blocks.0.expand.weight"
    packed = compress(cnn, importance={name: importance.double()}, **options)
    even = compress(cnn, **options)

    def errors(model: nn.Module) -> Tensor:
        rows = model.blocks[0].expand.weight.flatten(1)
        distances = torch.cdist(cnn.blocks[0].expand.weight.flatten(1), rows)
        return distances.min(1).values

    assert errors(packed)[5] < 0.7 * errors(even)[5]
    assert importance[5].eq(1).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens)))


class Shared(nn.Module):
    """One module under two names, and nested."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.inner = nn.ModuleDict(
            {"again": self.first, "list": nn.ModuleList([nn.Linear(16, 16)])}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["list"][0](self.inner["again"](self.first(x)))


class Buffers(nn.Module):
    """Plain, non-persistent, integer, masked and shared buffers; scalar, integer and double-named
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))
        self.register_buffer("shift", torch.arange(16.0) / 3, persistent=False)
        self.register_buffer("index", torch.arange(16).flip(0))
        self.register_buffer("empty", None)
        self.linear.register_buffer("same", self.shift)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.alias = self.gain
        self.order = nn.Parameter(torch.arange(16) + 3000, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)[:, self.index] + self.shift + self.linear.same + self.order / 3000
        return (x[:, None] + self.mask).softmax(-1).sum(1) * self.gain * self.alias


class Gain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.gain = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[0])


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.pointwise = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.grouped(x.view(-1, 4, 4)))


class Projections(nn.Module):
    """Attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None, :8], x[:, None, 8:])[0]


MAKES = {
    "tied": (Tied, torch.arange(12).view(3, 4)),
    "shared": (Shared, rand(3, 16)),
    "buffers": (Buffers, rand(3, 16)),
    "container": (Gain, rand(3, 16)),
    "recurrent": (Recurrent, rand(3, 16)),
    "conv1d": (Conv1d, rand(3, 16)),
    "projections": (Projections, rand(3, 16)),
    "a single layer": (lambda: nn.Linear(16, 24), rand(3, 16)),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).to(memory_format=torch.channels_last),
        rand(3, 4, 2, 2),
    ),
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("filter_fn", [jlcm.linear_and_convolution, jlcm.with_embeddings])
def test_models_of_every_make(make, filter_fn, tmp_path):
    build_model, x = MAKES[make]
    model = build_model().eval()
    packed = compress(model, alpha=3.5, filter_fn=filter_fn)
    assert not list(packed.parameters())
    reference = dense(packed, model)(x)
    assert (packed(x) - reference).abs().max() <= 1e-6 * max(1, reference.abs().max())
    # and back from a file
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=build_model())
    assert torch.equal(again(x), packed(x)) and codes_hash(again) == codes_hash(packed)
    payload = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert jlcm.footprint(path).payload == payload == jlcm.footprint(again).payload


def test_tied_weights_stay_tied_and_are_stored_once():
    model = Tied()
    packed = compress(model, alpha=3.5)
    assert packed.head.packed["weight"] is packed.embed.packed["weight"]
    assert isinstance(packed.head.packed["weight"], PackedWeight)
    footprint = jlcm.footprint(packed)
    assert footprint.reference_layers == 2 * (40 * 16 + 16 * 16)
    assert footprint.alpha_layers >= 3.5
    packed = packed.half()
    assert packed.head.packed["weight"] is packed.embed.packed["weight"]


def test_embeddings_are_compressed_on_request_only():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 8))
    names = {
        f: {
            n
            for n, s in stored_tensors(compress(model, filter_fn=f))
            if isinstance(s, PackedWeight)
        }
        for f in (jlcm.linear_and_convolution, jlcm.with_embeddings)
    }
    assert names[jlcm.linear_and_convolution] == {"1.weight"}
    assert names[jlcm.with_embeddings] == {"0.weight", "1.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_models_of_other_dtypes(networks, name, dtype, tmp_path):
    model, x = networks[name]
    model, x = model.to(dtype), x.to(dtype)
    packed = compress(model, alpha=2.5, encoding="auto")
    output = packed(x)
    assert output.dtype == dtype and output.isfinite().all()
    expected = dense(packed, model)(x)
    tolerance = 1e-6 if dtype == torch.float64 else 0.03
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(x), output)


def test_mixed_dtypes_survive_the_file(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16).bfloat16()
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(x.bfloat16()).float()).double())

    x = rand(3, 16)
    packed = compress(Mixed(), alpha=2.5)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    assert torch.equal(jlcm.load(path, model=Mixed())(x), packed(x))
    assert jlcm.load(path, model=Mixed(), dtype=torch.float32).head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_casts_after_compression(networks, name):
    model, x = networks[name]
    packed = compress(model, alpha=2.5)
    before = codes_hash(packed)
    expected = packed(x)
    double = packed.double()(x.double())
    assert double.dtype == torch.float64
    assert (double - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(packed.float()(x), expected) and codes_hash(packed) == before


def test_first_and_last_in_int8(mlp):
    packed = compress(mlp, alpha=7.0, encoding=jlcm.Encoding(first_last="int8"))
    layers = {layer.name: layer for layer in jlcm.footprint(packed).layers}
    assert [layers[f"{i}.weight"].bits for i in (0, 2, 4)] == [8, 2, 8]
    assert 2 * 48 * 48 / layers["2.weight"].nbytes >= 7.0
    assert layers["0.weight"].relative_error < 0.01


def test_first_and_last_of_two_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    packed = compress(model, encoding=jlcm.Encoding(first_last="int8"))
    assert all(layer.bits == 8 for layer in jlcm.footprint(packed).layers)


def test_layers_with_fewer_bits_are_noted(mlp):
    packed = compress(mlp, alpha=4.0)
    bits = {layer.name: layer.bits for layer in jlcm.footprint(packed).layers}
    fewer = {name for name, b in bits.items() if b < max(bits.values())}
    assert fewer and {note.partition(":")[0] for note in packed.compression.notes} == fewer


def test_orders_that_cannot_be_propagated_are_noted(mlp):
    packed = compress(mlp, example_inputs=torch.zeros(1, 7))
    assert any("not propagated" in note for note in packed.compression.notes)


def test_unselected_layers_stay_in_16_bits(mlp):
    packed = compress(mlp, filter_fn=lambda module, name: name == "2")
    kinds = {n: type(s).__name__ for n, s in stored_tensors(packed) if n.endswith("weight")}
    assert kinds == {"0.weight": "HalfTensor", "2.weight": "PackedWeight", "4.weight": "HalfTensor"}
    assert torch.equal(packed[0].weight, mlp[0].weight.half().float())


def test_weights_without_elements_are_passed_over():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(0, 8))
    packed = compress(model, alpha=2.5)
    assert [layer.name for layer in jlcm.footprint(packed).layers] == ["0.weight"]


@pytest.mark.parametrize("reorder", ["auto", "none"])
def test_learning_lowers_the_output_error_at_equal_bytes(cnn, reorder):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(72, 3, 16, 16, generator=generator)
    options = {"reorder": reorder, "example_inputs": images[:1], "encoding": "multi_codebook"}
    start = compress(cnn, **options)
    learned = compress(
        cnn,
        **options,
        calibration=images[:48],
        learn=jlcm.Learn(kind="lnq"),
        distill=jlcm.Distill(epochs=2),
    )
    assert jlcm.footprint(learned).as_dict() == jlcm.footprint(start).as_dict()
    assert [type(result).__name__ for result in learned.learning[-2:]] == [
        "LayerResult",
        "DistillResult",
    ]
    with torch.no_grad():
        target = cnn(images[48:])  # not seen by the learning
        before, after = ((m(images[48:]) - target).norm() for m in (start, learned))
    assert after < 0.8 * before
