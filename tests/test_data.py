"""Splits don't overlap, files are checked before use, and pixels are what PIL and numpy say."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from experiments.config import DigitsConfig, ImageFolderConfig, ImageListConfig
from experiments.data import load_data
from experiments.data.digits import digits_images, digits_preprocessing, split_digits
from experiments.data.images import ImageFiles, take
from experiments.data.preprocessing import Preprocessing, image_transform

DATA = Path(os.environ.get("JLCM_DATA") or Path(__file__).parents[1] / "../shared/data")
SMALL = Preprocessing(
    resize=16, crop=12, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5)
)


def _image(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with six training and four validation images each."""
    for part, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                seed = index + 10 * label + 100 * (part == "val")
                _image(tmp_path / part / name / f"{index}.png", seed)
    return tmp_path


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Four test images and three calibration images with their lists."""
    for name, count in (("test", 4), ("calibration", 3)):
        lines = []
        for index in range(count):
            _image(tmp_path / name / f"{index}.png", index + 100 * (name == "test"))
            lines.append(f"{index}.png\t{index % 3}\n")
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    return tmp_path


def _list_config(lists: Path, **changes: object) -> ImageListConfig:
    values = {
        "root": str(lists / "test"),
        "list": str(lists / "test.tsv"),
        "calibration_root": str(lists / "calibration"),
        "calibration_list": str(lists / "calibration.tsv"),
    }
    return ImageListConfig(**{**values, **changes})


# Digits


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_digits_split_is_a_stratified_partition(seed: int) -> None:
    split, labels = split_digits(seed), load_digits().target
    parts = [split.train, split.calibration, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert abs(len(part) / 1797 - share) < 0.005
        difference = np.bincount(labels[part]) / len(part) - np.bincount(labels) / 1797
        assert np.abs(difference).max() < 0.005


def test_digits_split_follows_the_seed() -> None:
    first, again, other = split_digits(3), split_digits(3), split_digits(4)
    for part in ("train", "calibration", "test"):
        assert np.array_equal(getattr(first, part), getattr(again, part))
        assert not np.array_equal(getattr(first, part), getattr(other, part))


def test_digits_pixels_agree_with_pil() -> None:
    preprocessing, positions = digits_preprocessing(24), np.array([5, 1000])
    images = digits_images(positions, preprocessing)
    for index, position in enumerate(positions):
        image, label = images[index]
        grey = Image.fromarray((load_digits().images[position] / 16).astype(np.float32))
        expected = np.asarray(grey.resize((24, 24), Image.Resampling.BILINEAR))
        expected = (expected - preprocessing.mean[0]) / preprocessing.std[0]
        assert image.shape == (3, 24, 24) and image.dtype == torch.float32
        for channel in image:
            np.testing.assert_allclose(channel.numpy(), expected, atol=1e-5)
        assert type(label) is int and label == load_digits().target[position]


def test_digits_data_sets_are_the_split() -> None:
    config = DigitsConfig(image_size=8, calibration_samples=50, limit=30)
    data = load_data(config, digits_preprocessing(8), classes=10, seed=2)
    split = split_digits(2)
    for part, positions in (
        (data.train, split.train),
        (data.calibration, split.calibration[:50]),
        (data.test, split.test[:30]),
    ):
        pixels = load_digits().images[positions] / 16
        assert len(part) == len(positions)
        stacked = torch.stack([image for image, _ in part])[:, 0].numpy()
        np.testing.assert_allclose(stacked * 0.376 + 0.305, pixels, atol=1e-6)
    everything = load_data(DigitsConfig(), digits_preprocessing(8), classes=10, seed=2)
    assert len(everything.calibration) == 360 and len(everything.test) == 360


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        ({}, 1000, "digits have 10 classes but the network has 1000"),
        ({"limit": 0}, 10, "data.limit=0"),
        ({"calibration_samples": -1}, 10, "data.calibration_samples=-1"),
    ],
)
def test_digits_bad_settings(changes: dict, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(DigitsConfig(**changes), digits_preprocessing(8), classes=classes, seed=0)


def test_digits_too_small() -> None:
    with pytest.raises(ValueError, match="data.image_size=4"):
        digits_preprocessing(4)


# Images


def test_transform_agrees_with_pil_and_numpy(tmp_path: Path) -> None:
    image = Image.open(_image(tmp_path / "a.png", 0, size=(40, 32)))
    # The shorter side, 32, becomes 16; the crop of 12 starts at (4, 2).
    pixels = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC))[2:14, 4:16] / 255
    expected = (pixels - SMALL.mean) / SMALL.std
    found = image_transform(SMALL)(image)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(("resize", "crop"), [(16, 20), (16, 0)])
def test_impossible_crop(resize: int, crop: int) -> None:
    with pytest.raises(ValueError, match=r"data\.(crop|resize)"):
        Preprocessing(
            resize=resize, crop=crop, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
        )


def test_folder_is_read_with_labels(folder: Path) -> None:
    data = load_data(ImageFolderConfig(root=str(folder)), SMALL, classes=2, seed=0)
    assert (len(data.test), len(data.calibration), data.classes) == (8, 12, 2)
    assert [label for _, label in data.test] == [0] * 4 + [1] * 4
    expected = image_transform(SMALL)(Image.open(folder / "val/dog/1.png"))
    assert torch.equal(data.test[5][0], expected)
    assert not {p for p, _ in data.test.samples} & {p for p, _ in data.calibration.samples}


def test_folder_subsets_are_seeded_and_mixed(folder: Path) -> None:
    def samples(seed: int, limit: int) -> tuple[list, list]:
        config = ImageFolderConfig(root=str(folder), calibration_samples=6, limit=limit)
        data = load_data(config, SMALL, classes=2, seed=seed)
        return data.test.samples, data.calibration.samples

    assert samples(0, 4) == samples(0, 4) != samples(1, 4)
    test, calibration = samples(0, 6)
    assert len(test) == len(calibration) == 6
    assert {label for _, label in test} == {label for _, label in calibration} == {0, 1}
    assert samples(0, 4)[0] == test[:4]


def test_take_keeps_everything_in_order() -> None:
    samples = [(str(index), index) for index in range(5)]
    assert take(samples, None, seed=0) == take(samples, 9, seed=0) == samples


@pytest.mark.parametrize("classes", [1, 3, 1000])
def test_folder_of_other_classes(folder: Path, classes: int) -> None:
    with pytest.raises(ValueError, match=f"2 class folders but the network has {classes}"):
        load_data(ImageFolderConfig(root=str(folder)), SMALL, classes=classes, seed=0)


def test_folder_missing_or_empty(tmp_path: Path, folder: Path) -> None:
    def load(root: Path) -> None:
        load_data(ImageFolderConfig(root=str(root)), SMALL, classes=2, seed=0)

    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: set data\.root"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is empty: set data\.root"):
        load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"data\.root must hold train/ and val/"):
        load(folder / "train")
    for path in (folder / "val/dog").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"val needs a folder per class .*dog"):
        load(folder)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        ImageFiles([(str(tmp_path / "a.png"), 0)], image_transform(SMALL))[0]


def test_lists_are_read(lists: Path) -> None:
    data = load_data(_list_config(lists), SMALL, classes=3, seed=0)
    assert [label for _, label in data.test] == [0, 1, 2, 0]
    assert [label for _, label in data.calibration] == [0, 1, 2]
    without = _list_config(lists, calibration_root=None, calibration_list=None)
    assert load_data(without, SMALL, classes=3, seed=0).calibration is None
    # One folder may serve both lists.
    (lists / "half.tsv").write_text("0.png\t0\n")
    (lists / "rest.tsv").write_text("\n1.png\t1\r\n")
    shared = _list_config(
        lists,
        list=str(lists / "half.tsv"),
        calibration_root=None,
        calibration_list=str(lists / "rest.tsv"),
    )
    data = load_data(shared, SMALL, classes=3, seed=0)
    assert [Path(path).name for path, _ in data.calibration.samples] == ["1.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0.png\t0\n1.png 1\n",
            r"test\.tsv:2: expected 'file name<TAB>class index', got '1\.png 1'",
        ),
        ("0.png\t0\t1\n", r"test\.tsv:1: expected"),
        ("0.png\tcat\n", r"test\.tsv:1: expected"),
        ("0.png\t-1\n", r"test\.tsv:1: expected"),
        ("\t1\n", r"test\.tsv:1: expected"),
        ("0.png\t0\n\n1.png\t3\n", r"test\.tsv:3: class index 3 is out of range .* 3 classes"),
        ("9.png\t0\n", r"test\.tsv:1: image .*9\.png does not exist"),
        ("", r"test\.tsv lists no images: set data\.list"),
        ("\n \n", r"test\.tsv lists no images"),
    ],
)
def test_bad_lists(lists: Path, content: str, message: str) -> None:
    (lists / "test.tsv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_data(_list_config(lists), SMALL, classes=3, seed=0)
    assert "\n" not in str(error.value)


def test_binary_list(lists: Path) -> None:
    (lists / "test.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"test\.tsv is not a UTF-8 text file"):
        load_data(_list_config(lists), SMALL, classes=3, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, r"nowhere does not exist: set data\.root"),
        ({"list": "nowhere.tsv"}, r"nowhere\.tsv does not exist: set data\.list"),
        ({"calibration_root": "nowhere"}, r"nowhere does not exist: set data\.calibration_root"),
        ({"calibration_list": "nowhere"}, r"nowhere does not exist: set data\.calibration_list"),
        ({"calibration_list": None}, r"data\.calibration_list=FILE"),
    ],
)
def test_missing_list_or_folder(lists: Path, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data(_list_config(lists, **changes), SMALL, classes=3, seed=0)


def _same_file(lists: Path) -> None:
    (lists / "calibration.tsv").write_text("../test/2.png\t2\n")


def _link(lists: Path) -> None:
    (lists / "calibration/1.png").unlink()
    (lists / "calibration/1.png").symlink_to(lists / "test/2.png")


def _copy(lists: Path) -> None:
    (lists / "calibration/1.png").write_bytes((lists / "test/2.png").read_bytes())


@pytest.mark.parametrize("overlap", [_same_file, _link, _copy])
def test_calibration_images_are_not_tested_on(lists: Path, overlap) -> None:
    overlap(lists)
    with pytest.raises(ValueError, match=r"test/2\.png of data\.list is also in"):
        load_data(_list_config(lists), SMALL, classes=3, seed=0)


def test_different_images_of_equal_size_are_accepted(lists: Path) -> None:
    for name, seed in (("test/0.bmp", 1), ("calibration/0.bmp", 2)):
        _image(lists / name, seed)
    assert (lists / "test/0.bmp").stat().st_size == (lists / "calibration/0.bmp").stat().st_size
    for name in ("test", "calibration"):
        (lists / f"{name}.tsv").write_text("0.bmp\t0\n")
    assert len(load_data(_list_config(lists), SMALL, classes=3, seed=0).test) == 1


def test_real_lists_do_not_overlap() -> None:
    vision = DATA / "vision"
    if not vision.is_dir():
        pytest.skip(f"no images in {vision}: set JLCM_DATA to the folder that holds vision/")
    config = ImageListConfig(
        root=str(vision / "imagenet_like_1000"),
        list=str(vision / "imagenet_like_1000.tsv"),
        calibration_root=str(vision / "imagenet_train_1000"),
        calibration_list=str(vision / "imagenet_train_1000.tsv"),
        calibration_samples=64,
    )
    data = load_data(config, SMALL, classes=1000, seed=0)
    assert (len(data.test), len(data.calibration)) == (1000, 64)
    image, label = data.test[0]
    assert image.shape == (3, 12, 12) and label == 305
    with pytest.raises(ValueError, match="out of range for a network of 10 classes"):
        load_data(config, SMALL, classes=10, seed=0)
