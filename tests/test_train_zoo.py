"""Training learns, goes on after an interruption as if nothing had happened, and checks inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.config import ImageFolderConfig, ModelConfig
from experiments.data import load_data
from experiments.evaluate.vision import accuracy, predict
from experiments.models import load_network
from scripts import train_zoo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Noise that is red in one class and blue in the other."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 10)):
        for channel, name in ((0, "red"), (2, "blue")):
            for index in range(count):
                pixels = generator.integers(0, 160, (36, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 95
                path = root / part / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def train(data: Path, output: Path, *options: str, name: str = "timm/test_resnet") -> None:
    source, _, name = name.rpartition("/")
    options = (f"--source={source or 'torchvision'}", "--workers=0", "--device=cpu", *options)
    small = () if "vit" in name else ("--image-size=32",)
    train_zoo.main([name, f"--data={data}", f"--output={output}", *small, *options])


def same(first: Path, second: Path) -> bool:
    """Bytes may differ: the header's order is not fixed."""
    one, other = load_file(first), load_file(second)
    equal = one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    return equal and metadata(first) == metadata(second)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_learns_and_the_file_is_for_runs(data: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "new" / "a.safetensors"
    train(data, path, "--epochs=12", "--batch-size=8", name="shufflenet_v2_x0_5")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    about = metadata(path)
    assert json.loads(about["architecture"])["builder"] == "torchvision.models:shufflenet_v2_x0_5"
    assert (about["epochs"], about["seed"], about["image_size"]) == ("12", "0", "32")
    dtypes = {t.dtype for n, t in load_file(path).items() if not n.endswith("batches_tracked")}
    assert dtypes == {torch.float16}
    # The printed command's options give the accuracy that was measured.
    *_, command = capsys.readouterr().out.strip().splitlines()
    options = dict(word.split("=", 1) for word in command.split()[2:])
    assert options["model.weights"] == str(path) and options["data.root"] == str(data)
    model = ModelConfig(
        source=options["model.source"], name=options["model.name"], weights=str(path)
    )
    crop, resize = int(options["data.crop"]), int(options["data.resize"])
    images = ImageFolderConfig(root=str(data), crop=crop, resize=resize)
    network = load_network(model, images, seed=0, device=CPU)
    test = load_data(images, network.preprocessing, classes=2, seed=0).test
    logits, labels = predict(
        network.module, test, device=CPU, batch_size=20, workers=0, description=""
    )
    assert accuracy(logits, labels)["top1"] == float(about["val_top1"]) >= 90


@pytest.mark.parametrize(
    ("name", "workers"), [("timm/test_resnet", 2), ("timm/test_resnet", 0), ("timm/test_vit", 0)]
)
def test_interrupted_training_ends_the_same(
    data: Path, tmp_path: Path, monkeypatch, name: str, workers: int
) -> None:
    options = ("--epochs=2", "--batch-size=16", f"--workers={workers}")
    train(data, tmp_path / "whole.safetensors", *options, name=name)
    path, keep = tmp_path / "parts.safetensors", train_zoo._keep

    def stop(job, module, optimizer, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt  # the second epoch is lost
        keep(job, module, optimizer, done)

    monkeypatch.setattr(train_zoo, "_keep", stop)
    with pytest.raises(SystemExit, match="the same command goes on"):
        train(data, path, *options, name=name)
    monkeypatch.undo()
    kept = tmp_path / "parts.safetensors.training.safetensors"
    assert metadata(kept)["finished_epochs"] == "1" and not path.exists()
    train(data, path, *options, name=name)
    assert same(path, tmp_path / "whole.safetensors")
    assert not kept.exists()


def test_the_seed_decides(data: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for path, options in zip(paths, [(), (), ("--seed=1",)], strict=True):
        state = torch.get_rng_state()
        train(data, path, "--epochs=1", *options)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # no random numbers from elsewhere
    assert same(paths[0], paths[1])
    first, other = load_file(paths[0]), load_file(paths[2])
    assert not any(torch.equal(t, other[n]) for n, t in first.items() if t.ndim > 1)


def test_finished_and_foreign_files(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(train_zoo, "_top1", _interrupt)
    with pytest.raises(SystemExit):  # before anything is kept
        train(data, path, "--epochs=2")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    train(data, path, "--epochs=1")
    before = path.read_bytes()
    capsys.readouterr()
    train(data, path, "--epochs=1")
    assert "finished already" in capsys.readouterr().out and path.read_bytes() == before
    with pytest.raises(SystemExit, match=r"another command \(epochs: 1 there, 2 here\)"):
        train(data, path, "--epochs=2")
    kept = tmp_path / "b.safetensors.training.safetensors"
    path.rename(kept)  # settings decide, whatever the file's name
    with pytest.raises(SystemExit, match=r"seed: 0 there, 3 here\): delete it, or choose another"):
        train(data, tmp_path / "b.safetensors", "--epochs=1", "--seed=3")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(SystemExit, match="not of this script"):
        train(data, path, "--epochs=1")
    kept.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="not of this script"):
        train(data, tmp_path / "b.safetensors", "--epochs=1")


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", (), "resnet81 is unknown to torchvision, did you mean"),
        ("timm/resnet_18", (), "resnet_18 is unknown to timm, did you mean"),
        ("resnet18", ("--data=nowhere",), "data folder nowhere does not exist: set --data=FOLDER"),
        ("resnet18", ("--output=a.pth",), "must name a file that ends in .safetensors"),
        ("vit_b_16", ("--image-size=64",), "takes only --image-size 224, not 64"),
        ("squeezenet1_1", ("--image-size=8",), "cannot take images of 8 x 8 .*: set --image-size"),
        ("googlenet", (), "several outputs in training"),
        (
            "resnet18",
            ("--rate=1e30", "--batch-size=8"),
            "diverged in epoch 1 .*: use a smaller",
        ),
    ],
)
def test_errors(data: Path, tmp_path: Path, name: str, options, message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        train(data, tmp_path / "a.safetensors", *options, name=name)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unreachable_gpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--device cuda can't be used .*: use --device cpu"):
        train(data, tmp_path / "a.safetensors", "--device=cuda")


@pytest.mark.parametrize("option", ["--epochs=0", "--rate=nan", "--seed=-1", "--batch-size=x"])
def test_numbers_out_of_range(data: Path, tmp_path: Path, option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        train(data, tmp_path / "a.safetensors", option)
    assert option.partition("=")[0] in capsys.readouterr().err


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"

    def add(part: str, name: str, content: bytes = b"") -> Path:
        path = tmp_path / "data" / part / name / "a.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return path

    add("train", "cat")
    with pytest.raises(SystemExit, match="val does not exist"):
        train(tmp_path / "data", output)
    add("val", "cat")
    with pytest.raises(SystemExit, match="the same two or more class folders"):
        train(tmp_path / "data", output)
    add("train", "dog")
    with pytest.raises(SystemExit, match="1 class folders but the network has 2"):
        train(tmp_path / "data", output)
    bird = add("val", "bird")
    with pytest.raises(SystemExit, match="the same two or more class folders"):
        train(tmp_path / "data", output)
    bird.parent.rename(bird.parent.with_name("dog"))
    with pytest.raises(SystemExit, match="cannot be read as an image"):
        train(tmp_path / "data", output)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit, match="file"):
        train(tmp_path / "data", tmp_path / "file" / "a.safetensors")
