"""Data sets of the experiments: what networks are calibrated on and what they are tested on."""

import sys
from dataclasses import dataclass

from torch.utils.data import Dataset

from experiments.config import DataConfig, DigitsConfig, ImageFolderConfig, ImageListConfig
from experiments.data.digits import CLASSES, digits_images, split_digits
from experiments.data.images import (
    ImageFiles,
    existing_folder,
    folder_samples,
    list_samples,
    refuse_overlap,
    take,
)
from experiments.data.preprocessing import Preprocessing, image_transform

__all__ = ["Data", "Preprocessing", "check_files", "load_data"]


@dataclass(kw_only=True)
class Data:
    """Data sets of (float32 image (3, height, width), int label).

    Attributes:
        calibration: images that a method may look at; None where the user has given none.
        test: images that only the evaluation sees.
        classes: number of classes.
        train: what a network was trained on, where it is trained here.
    """

    calibration: Dataset | None
    test: Dataset
    classes: int
    train: Dataset | None = None


def load_data(data: DataConfig, preprocessing: Preprocessing, *, classes: int, seed: int) -> Data:
    """Find the images and check them, without reading their pixels.

    `data.limit` keeps the first test images after a shuffle with `seed`, since files are usually
    sorted by class. At most `data.calibration_samples` images are drawn for calibration.

    Args:
        data: which data set.
        preprocessing: what the network expects.
        classes: number of classes of the network.
        seed: seed of splits, subsets and shuffles.

    Returns:
        The data sets.

    Raises:
        FileNotFoundError: files or folders are missing.
        ValueError: files are malformed, or labels do not belong to the network.
    """
    _check_count("data.calibration_samples", data.calibration_samples)
    _check_count("data.limit", data.limit)
    match data:
        case DigitsConfig():
            return _digits(data, preprocessing, classes=classes, seed=seed)
        case ImageFolderConfig():
            test = folder_samples(data.root, "val", classes=classes)
            calibration = folder_samples(data.root, "train", classes=classes)
        case ImageListConfig():
            test = list_samples(data.root, data.list, classes=classes, options="data.")
            calibration = _calibration_list(data, classes=classes)
            refuse_overlap(test, calibration)
        case _:
            raise TypeError(f"no data set for {type(data).__name__}")
    transform = image_transform(preprocessing)
    chosen = take(calibration, data.calibration_samples, seed=seed)
    return Data(
        calibration=ImageFiles(chosen, transform) if chosen else None,
        test=ImageFiles(take(test, data.limit, seed=seed), transform),
        classes=classes,
    )


def check_files(data: DataConfig) -> None:
    """Check that folders and lists exist, before a network is fetched or trained.

    Raises:
        FileNotFoundError, ValueError: as `load_data`.
    """
    match data:
        case ImageFolderConfig():
            existing_folder(data.root, "data.root")
        case ImageListConfig():
            list_samples(data.root, data.list, classes=sys.maxsize, options="data.")
            _calibration_list(data, classes=sys.maxsize)


def _digits(data: DigitsConfig, preprocessing: Preprocessing, *, classes: int, seed: int) -> Data:
    """Split the digits; calibration images are not used in training."""
    if classes != CLASSES:
        raise ValueError(f"digits have {CLASSES} classes but the network has {classes}")
    split = split_digits(seed)  # already shuffled
    return Data(
        calibration=digits_images(split.calibration[: data.calibration_samples], preprocessing),
        test=digits_images(split.test[: data.limit], preprocessing),
        classes=classes,
        train=digits_images(split.train, preprocessing),
    )


def _calibration_list(data: ImageListConfig, *, classes: int) -> list[tuple[str, int]]:
    """Read the list for calibration, if there is one."""
    if data.calibration_list is None:
        if data.calibration_root is not None:
            raise ValueError("data.calibration_root is set: set data.calibration_list=FILE, too")
        return []
    return list_samples(
        data.calibration_root or data.root,
        data.calibration_list,
        classes=classes,
        options="data.calibration_",
    )


def _check_count(option: str, count: int | None) -> None:
    """Refuse counts that leave nothing."""
    if count is not None and count < 1:
        raise ValueError(f"{option}={count}: at least one image is needed")
