"""Labelled image files on disk: folders per class and lists, checked before anything is run."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from experiments.cache import hash_file
from jlcm.torchvision_compat import declare_missing_operators

#: A file with its class index.
Sample = tuple[str, int]


class ImageFiles(Dataset):
    """Image files that are read when they are asked for."""

    def __init__(
        self, samples: Sequence[Sample], transform: Callable[[Image.Image], torch.Tensor]
    ) -> None:
        """Keep the files' names and the transform to the network's input."""
        self.samples, self.transform = list(samples), transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image, float32 (3, crop, crop), with its label."""
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), label
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def take(samples: Sequence[Sample], count: int | None, *, seed: int) -> list[Sample]:
    """Take the first samples after a seeded shuffle.

    Files are usually sorted by class, so the first ones alone would be one class. A larger count
    contains the smaller ones.

    Args:
        samples: all samples.
        count: how many to take; None or at least as many as there are: all, in their order.
        seed: seed of the shuffle.

    Returns:
        The chosen samples.
    """
    if count is None or count >= len(samples):
        return list(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[index] for index in order[:count].tolist()]


def folder_samples(root: str, part: str, *, classes: int) -> list[Sample]:
    """List the images of one part of ImageNet's folder layout, `root/part/<class>/<image>`.

    Args:
        root: the data set's folder.
        part: "train" or "val".
        classes: number of classes of the network.

    Returns:
        The files, sorted by class; class indices follow the sorted folder names.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: the number of class folders is not the network's.
    """
    declare_missing_operators()
    from torchvision.datasets import ImageFolder

    folder = existing_folder(root, "data.root") / part
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: data.root must hold train/ and val/ with a folder per class"
        )
    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} needs a folder per class with images in each (data.root={root}): {error}"
        ) from error
    if len(dataset.classes) != classes:
        raise ValueError(
            f"{folder} has {len(dataset.classes)} class folders but the network has {classes} "
            "classes: set data.root or model.weights so that they agree"
        )
    return dataset.samples


def list_samples(root: str, list_file: str, *, classes: int, options: str) -> list[Sample]:
    """Read a labelled list: file name relative to `root`, tab, class index; one image per line.

    Args:
        root: folder of the images.
        list_file: the list.
        classes: number of classes of the network; labels are 0 .. classes - 1.
        options: prefix of the configuration's keys, for messages: "data." or "data.calibration_".

    Returns:
        The files in the list's order.

    Raises:
        FileNotFoundError: the list, the folder or an image is missing.
        ValueError: a line is malformed, a label is out of range, or the list is empty.
    """
    folder, source = existing_folder(root, f"{options}root"), Path(list_file)
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: set {options}list to a labelled list")
    samples: list[Sample] = []
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a UTF-8 text file ({options}list): {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            samples.append(_parse(line, folder, where=f"{source}:{number}", classes=classes))
    if not samples:
        raise ValueError(f"{source} lists no images: set {options}list to a non-empty list")
    return samples


def _parse(line: str, folder: Path, *, where: str, classes: int) -> Sample:
    """Read one line of a list."""
    name, *rest = line.split("\t")
    # `str.isdecimal` alone accepts digits of other scripts.
    if not name or len(rest) != 1 or not (rest[0].isascii() and rest[0].strip().isdecimal()):
        raise ValueError(f"{where}: expected 'file name<TAB>class index', got {line[:80]!r}")
    label, path = int(rest[0]), folder / name
    if label >= classes:
        raise ValueError(
            f"{where}: class index {label} is out of range for a network of {classes} classes"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{where}: image {path} does not exist")
    return str(path), label


def existing_folder(path: str, option: str) -> Path:
    """Check that a folder is there and not empty."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist: set {option}=FOLDER")
    with os.scandir(folder) as entries:
        if next(entries, None) is None:
            raise FileNotFoundError(f"data folder {folder} is empty: set {option}=FOLDER")
    return folder


def refuse_overlap(test: Sequence[Sample], calibration: Sequence[Sample]) -> None:
    """Refuse images that are used for both calibration and evaluation.

    Two files are the same image when they resolve to the same path or have equal bytes.

    Raises:
        ValueError: an image is in both lists; the message names the first one.
    """
    tested = {os.path.realpath(path): path for path, _ in test}
    # Files of different sizes differ, so only equal sizes need reading.
    sizes = {os.path.getsize(path) for path in tested}
    shared_sizes = {size for path, _ in calibration if (size := os.path.getsize(path)) in sizes}
    hashes = {hash_file(path): path for path in tested if os.path.getsize(path) in shared_sizes}
    for path, _ in calibration:
        resolved = os.path.realpath(path)
        other = tested.get(resolved)
        if other is None and os.path.getsize(path) in shared_sizes:
            other = hashes.get(hash_file(path))
        if other is not None:
            raise ValueError(
                f"image {other} of data.list is also in data.calibration_list (as {path}): "
                "images for calibration must not be evaluated on"
            )
