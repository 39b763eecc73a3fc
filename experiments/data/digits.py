"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images, available without a download."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import Dataset

from experiments.data.preprocessing import Preprocessing

CLASSES = 10
#: Grey values of the digits run from 0 to 16.
_WHITE = 16.0
#: Parts of all images held out for testing and for calibration; the rest is for training.
_TEST, _CALIBRATION = 0.2, 0.2


@dataclass(frozen=True, kw_only=True)
class DigitsSplit:
    """Disjoint, stratified positions in the data set, each int64 (samples,)."""

    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


class TensorImages(Dataset):
    """Images in memory: float32 (samples, 3, height, width) with int64 labels (samples,)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep the tensors."""
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image (3, height, width) with its label."""
        return self.images[index], int(self.labels[index])


def digits_preprocessing(image_size: int) -> Preprocessing:
    """Describe how digits are shown to a network: bilinear upsampling, three equal channels.

    Args:
        image_size: height and width in pixels.

    Returns:
        The preprocessing, with the mean and standard deviation of the digits' pixels.
    """
    if image_size < 8:
        raise ValueError(f"data.image_size={image_size}: digits have 8 x 8 pixels, use 8 or more")
    return Preprocessing(
        resize=image_size,
        crop=image_size,
        interpolation="bilinear",
        mean=(0.305, 0.305, 0.305),
        std=(0.376, 0.376, 0.376),
    )


def split_digits(seed: int) -> DigitsSplit:
    """Split the digits into about 60 % training, 20 % calibration and 20 % test images.

    Args:
        seed: seed of the shuffle; equal seeds give equal splits.

    Returns:
        Disjoint positions, shuffled, with the classes in equal proportions.
    """
    labels = load_digits().target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST, random_state=seed, stratify=labels
    )
    train, calibration = train_test_split(
        rest, test_size=_CALIBRATION / (1 - _TEST), random_state=seed, stratify=labels[rest]
    )
    return DigitsSplit(train=train, calibration=calibration, test=test)


def digits_images(positions: np.ndarray, preprocessing: Preprocessing) -> TensorImages:
    """Upsample and normalise some of the digits.

    Args:
        positions: positions in the data set, (samples,).
        preprocessing: what `digits_preprocessing` returns.

    Returns:
        The images, float32 (samples, 3, image_size, image_size), with their labels.
    """
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images[positions]).float().unsqueeze(1) / _WHITE
    side = preprocessing.crop
    grey = functional.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return TensorImages((grey - mean) / std, torch.from_numpy(bunch.target[positions]).long())
