"""Networks load with their own preprocessing, refuse what does not fit, and train reproducibly."""

import copy
import functools
import math
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from experiments.config import (
    DigitsConfig,
    ImageFolderConfig,
    ImageListConfig,
    ModelConfig,
)
from experiments.data import load_data
from experiments.models import Network, digits, load_network
from experiments.models.weights import load_weights, read_weights
from jlcm.architecture import Architecture

DATA = Path(os.environ.get("JLCM_DATA") or Path(__file__).parents[1] / "../shared/data")
CPU = torch.device("cpu")
IMAGES = ImageFolderConfig(root="unused")
RESNET = Architecture(builder="torchvision.models:resnet18", arguments={"num_classes": 7})
#: timm's tiny network for tests.
TINY = ModelConfig(source="timm", name="test_resnet")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))


def _data_file(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: set JLCM_DATA to the folder that holds {name}")
    return str(path)


def _torchvision(name: str, weights: str | None = None) -> ModelConfig:
    return ModelConfig(source="torchvision", name=name, weights=weights)


def _random_network(seed: int = 0) -> nn.Module:
    """A ResNet-18 whose batch norms have something to fold."""
    torch.manual_seed(seed)
    network = RESNET.build("cpu")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


def _saved(network: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> str:
    state = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in network.state_dict().items()
    }
    save_file(state, path)
    return str(path)


def _assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# Names and preprocessing


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("torchvision", "resnet19", "resnet19 is unknown to torchvision, did you mean resnet18"),
        ("timm", "no_such_network", "no_such_network is unknown to timm"),
        ("efficientnet_lite", "efficientnet_lite9", "did you mean efficientnet_lite"),
        ("keras", "resnet18", "model.source=keras is unknown"),
    ],
)
def test_unknown_names(source: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_network(ModelConfig(source=source, name=name), IMAGES, seed=0, device=CPU)


def _preprocessing_of(model: ModelConfig, tmp_path: Path, **changes: int) -> tuple:
    """Load random weights and describe the preprocessing."""
    source, name = model.source, model.name
    builder, arguments = f"torchvision.models:{name}", {}
    if source != "torchvision":
        name = f"tf_{name}" if source == "efficientnet_lite" else name
        builder, arguments = "timm:create_model", {"model_name": name}
    network = Architecture(builder=builder, arguments=arguments).build("cpu")
    weights = _saved(network, tmp_path / f"{name}.safetensors")
    loaded = load_network(
        ModelConfig(source=source, name=model.name, weights=weights),
        ImageFolderConfig(root="unused", **changes),
        seed=0,
        device=CPU,
    )
    found = loaded.preprocessing
    return found.resize, found.crop, found.interpolation, found.mean, found.std


@pytest.mark.parametrize(
    ("source", "name", "changes", "expected"),
    [
        ("torchvision", "resnet18", {}, (256, 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD)),
        ("torchvision", "resnet18", {"crop": 112}, (128, 112, "bilinear")),
        ("torchvision", "resnet18", {"crop": 128, "resize": 144}, (144, 128, "bilinear")),
        ("torchvision", "resnet18", {"resize": 240}, (240, 224, "bilinear")),
        ("timm", "deit_tiny_patch16_224", {}, (248, 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD)),
        ("efficientnet_lite", "efficientnet_lite0", {}, (256, 224, "bicubic")),
    ],
)
def test_preprocessing(
    tmp_path: Path, source: str, name: str, changes: dict, expected: tuple
) -> None:
    found = _preprocessing_of(ModelConfig(source=source, name=name), tmp_path, **changes)
    assert found[: len(expected)] == expected


def test_efficientnet_lite_normalisation(tmp_path: Path) -> None:
    model = ModelConfig(source="efficientnet_lite", name="efficientnet_lite0")
    *_, mean, std = _preprocessing_of(model, tmp_path)
    for pixel in (0, 127, 255):
        assert math.isclose((pixel / 255 - mean[1]) / std[1], (pixel - 127) / 128, abs_tol=1e-12)


@pytest.mark.parametrize(("source", "name"), [("torchvision", "vit_b_16"), ("timm", "test_vit")])
def test_size_of_vision_transformers_is_fixed(source: str, name: str) -> None:
    data = ImageFolderConfig(root="unused", crop=96)
    with pytest.raises(ValueError, match=rf"{name} takes images of .*remove data\.crop=96"):
        load_network(ModelConfig(source=source, name=name), data, seed=0, device=CPU)


# Weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_local_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    network = _random_network()
    weights = _saved(network, tmp_path / "a.safetensors", dtype)
    loaded = load_network(_torchvision("resnet18", weights), IMAGES, seed=0, device=CPU)
    assert loaded.classes == 7 and loaded.architecture == RESNET
    assert not loaded.module.training
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    _assert_equal_states(loaded.module, network.to(dtype).float())
    rebuilt = loaded.architecture.build("cpu")
    rebuilt.load_state_dict(loaded.module.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(rebuilt(images), loaded.module(images))


def _drop_bias(state: dict) -> dict:
    return {n: t for n, t in state.items() if n != "layer1.0.bn1.bias"}


def _add_entry(state: dict) -> dict:
    return {**state, "head.weight": torch.zeros(1)}


def _reshape(state: dict) -> dict:
    return {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}


def _no_classifier(state: dict) -> dict:
    return {n: t for n, t in state.items() if not n.startswith("fc.")}


def _not_finite(state: dict) -> dict:
    return {**state, "fc.bias": torch.full((7,), math.nan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_bias, r"1 missing \(layer1\.0\.bn1\.bias\), 0 unexpected"),
        (_add_entry, r"0 missing, 1 unexpected \(head\.weight\)"),
        (_reshape, r"conv1\.weight has shape \(64, 3, 3, 3\), the network needs \(64, 3, 7, 7\)"),
        (_no_classifier, r"lack fc\.weight: model\.name must be"),
        (_not_finite, r"fc\.bias holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change, message: str) -> None:
    save_file(change(_random_network().state_dict()), tmp_path / "a.safetensors")
    model = _torchvision("resnet18", str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match=message) as error:
        load_network(model, IMAGES, seed=0, device=CPU)
    assert "a.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_missing_or_damaged_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere do not exist: set model\.weights"):
        read_weights("nowhere")
    (tmp_path / "a.pth").write_bytes(b"\x80\x02 a pickle" * 10)
    with pytest.raises(ValueError, match=r"a\.pth are not a readable safetensors file"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("keep_batch_norm", [False, True])
def test_biases_of_folded_convolutions_are_absorbed(keep_batch_norm: bool) -> None:
    original = _random_network()
    folded = copy.deepcopy(original)
    state: dict[str, torch.Tensor] = {}
    for parent_name, parent in folded.named_modules():
        children = dict(parent.named_children())
        for name, following in list(zip(children, list(children)[1:], strict=False)):
            if name.startswith("conv") or parent_name.endswith("downsample"):
                convolution, norm = children[name], children[following]
                if not isinstance(norm, nn.BatchNorm2d):
                    following, norm = "bn" + name[-1], children["bn" + name[-1]]
                prefix = f"{parent_name}." if parent_name else ""
                if keep_batch_norm:
                    # A bias before an unchanged batch norm: what the norm sees is shifted.
                    bias = torch.randn(convolution.out_channels)
                    setattr(parent, name, _with_bias(convolution, bias))
                    norm.running_mean += bias
                else:
                    setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                    setattr(parent, following, nn.Identity())
                assert f"{prefix}{name}.weight" in original.state_dict()
    state = folded.state_dict()
    assert any(name.endswith("conv2.bias") for name in state)
    loaded = RESNET.build("cpu")
    load_weights(loaded, state, path="a")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    difference = loaded(images) - original(images)
    assert difference.norm() < 1e-5 * original(images).norm()


def _with_bias(convolution: nn.Conv2d, bias: torch.Tensor) -> nn.Conv2d:
    """The same convolution with a bias."""
    found = copy.deepcopy(convolution)
    found.bias = nn.Parameter(bias)
    return found


def test_unreachable_torchvision_hub(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ConnectionError, match=r"resnet18 .*Name or service.*model\.weights=FILE"):
        load_network(_torchvision("resnet18"), IMAGES, seed=0, device=CPU)


def test_unreachable_timm_hub(monkeypatch) -> None:
    import timm

    create = timm.create_model

    @functools.wraps(create)
    def refuse(name: str = "", pretrained: bool = False, **arguments: object) -> nn.Module:
        if pretrained:
            raise FileNotFoundError("cannot find the requested files\nin the local cache")
        return create(arguments.pop("model_name", name), **arguments)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConnectionError, match=r"hub of timm.*model\.weights=FILE") as error:
        load_network(TINY, IMAGES, seed=0, device=CPU)
    assert "\n" not in str(error.value)


def test_timm_network_without_pretrained_weights() -> None:
    import timm

    untrained = [
        n for n in timm.list_models("resnet*") if not timm.get_pretrained_cfg(n).has_weights
    ]
    model = ModelConfig(source="timm", name=untrained[0])
    with pytest.raises(ValueError, match=r"timm has no pretrained weights .*model\.weights=FILE"):
        load_network(model, IMAGES, seed=0, device=CPU)


def _top_1(loaded: Network, images: torch.utils.data.Dataset) -> float:
    """Percentage of images that are classified correctly."""
    batches = torch.utils.data.DataLoader(images, batch_size=16)
    with torch.inference_mode():
        hits = [(loaded.module(x).argmax(1) == y).float() for x, y in batches]
    return 100 * torch.cat(hits).mean().item()


def _like_imagenet(crop: int, limit: int | None) -> ImageListConfig:
    return ImageListConfig(
        root=_data_file("vision/imagenet_like_1000"),
        list=_data_file("vision/imagenet_like_1000.tsv"),
        crop=crop,
        resize=256,
        limit=limit,
    )


@pytest.mark.parametrize(
    ("limit", "least"), [(32, 65), pytest.param(None, 82.4, marks=pytest.mark.slow)]
)
def test_mobilenet_v2_on_real_images(limit: int | None, least: float) -> None:
    weights = _data_file("weights/mobilenet_v2_imagenet_dequantised.safetensors")
    data = _like_imagenet(224, limit)
    loaded = load_network(_torchvision("mobilenet_v2", weights), data, seed=0, device=CPU)
    images = load_data(data, loaded.preprocessing, classes=loaded.classes, seed=0)
    assert _top_1(loaded, images.test) >= least


@pytest.mark.parametrize(
    ("limit", "least"), [(64, 70), pytest.param(None, 84.0, marks=pytest.mark.slow)]
)
def test_resnet18_on_imagenette(limit: int | None, least: float) -> None:
    weights = _data_file("weights/resnet18_imagenette128.safetensors")
    root = _data_file("vision/imagenette144")
    data = ImageFolderConfig(root=root, crop=128, resize=144, limit=limit)
    loaded = load_network(_torchvision("resnet18", weights), data, seed=0, device=CPU)
    assert loaded.classes == 10
    images = load_data(data, loaded.preprocessing, classes=10, seed=0)
    assert _top_1(loaded, images.test) >= least


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "crop", "least"),
    [
        ("efficientnet_lite0", 224, 88),
        ("efficientnet_lite1", 240, 90.5),
        ("efficientnet_lite2", 256, 92),
    ],
)
def test_efficientnet_lite_on_real_images(name: str, crop: int, least: float) -> None:
    data = _like_imagenet(crop, None)
    model = ModelConfig(source="efficientnet_lite", name=name)
    loaded = load_network(model, data, seed=0, device=CPU)
    images = load_data(data, loaded.preprocessing, classes=1000, seed=0)
    assert _top_1(loaded, images.test) >= least


# Digits


def test_training_is_cached_and_reproducible(tmp_path: Path, monkeypatch) -> None:
    data = DigitsConfig(image_size=16, epochs=1)
    first = load_network(TINY, data, seed=0, device=CPU)
    assert (first.classes, first.preprocessing.crop) == (10, 16)
    other = load_network(TINY, data, seed=1, device=CPU)
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(digits, "train", lambda *_, **__: pytest.fail("trained again"))
        again = load_network(TINY, data, seed=0, device=CPU)
    _assert_equal_states(first.module, again.module)
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "second"))
    state = torch.random.get_rng_state()
    _assert_equal_states(first.module, load_network(TINY, data, seed=0, device=CPU).module)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [next(n.module.parameters()) for n in (first, other)]
    assert not torch.equal(*weights)
    longer = DigitsConfig(image_size=16, epochs=2)
    load_network(TINY, longer, seed=0, device=CPU)
    assert len(list((tmp_path / "second").iterdir())) == 2


def test_damaged_trained_network_is_refused(tmp_path: Path) -> None:
    data = DigitsConfig(image_size=16, epochs=1)
    load_network(TINY, data, seed=0, device=CPU)
    (cached,) = (tmp_path / "cache").iterdir()
    content = bytearray(cached.read_bytes())
    content[-9] ^= 64
    cached.write_bytes(content)
    with pytest.raises(ValueError, match="damaged .*: delete it and run again"):
        load_network(TINY, data, seed=0, device=CPU)


def test_training_learns_and_uses_the_training_part_only(monkeypatch) -> None:
    used = []
    make = digits.digits_images

    def record(positions, preprocessing):
        used.append(set(positions.tolist()))
        return make(positions, preprocessing)

    monkeypatch.setattr(digits, "digits_images", record)
    loaded = load_network(TINY, DigitsConfig(image_size=16, epochs=12), seed=3, device=CPU)
    split = digits.split_digits(3)
    assert used == [set(split.train.tolist()), set(split.test.tolist())]
    data = load_data(DigitsConfig(), loaded.preprocessing, classes=10, seed=3)
    assert _top_1(loaded, data.test) > 85


def test_local_weights_replace_the_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(digits, "train", lambda *_, **__: pytest.fail("trained"))
    arguments = {"model_name": "test_resnet", "num_classes": 10}
    network = Architecture(builder="timm:create_model", arguments=arguments).build("cpu")
    weights = _saved(network, tmp_path / "a.safetensors")
    model = ModelConfig(source="timm", name="test_resnet", weights=weights)
    loaded = load_network(model, DigitsConfig(), seed=0, device=CPU)
    _assert_equal_states(loaded.module, network)


def test_size_that_does_not_fit_fails_before_training() -> None:
    with pytest.raises(ValueError, match="cannot be built with .*'image_size': 30"):
        load_network(_torchvision("vit_b_16"), DigitsConfig(image_size=30), seed=0, device=CPU)
    with pytest.raises(ValueError, match=r"data\.epochs=0"):
        load_network(TINY, DigitsConfig(epochs=0), seed=0, device=CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "resnet50"),
        ("torchvision", "mobilenet_v2"),
        ("torchvision", "efficientnet_b0"),
        ("torchvision", "vit_b_16"),
        ("timm", "deit_tiny_patch16_224"),
        ("efficientnet_lite", "efficientnet_lite0"),
    ],
)
def test_networks_learn_the_digits(source: str, name: str) -> None:
    loaded = load_network(ModelConfig(source=source, name=name), DigitsConfig(), seed=0, device=CPU)
    data = load_data(DigitsConfig(), loaded.preprocessing, classes=10, seed=0)
    assert _top_1(loaded, data.test) >= 97
