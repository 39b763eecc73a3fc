"""What an image goes through before a network sees it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from jlcm.torchvision_compat import declare_missing_operators


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize the shorter side, cut out the centre, scale to 0..1, subtract `mean`, divide by `std`.

    Attributes:
        resize: length of the shorter side after resizing, in pixels.
        crop: side of the central square, in pixels.
        interpolation: bilinear or bicubic.
        mean: per channel (R, G, B), for values in 0..1.
        std: per channel, for values in 0..1.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Check the sizes, which a user may override."""
        if self.crop < 1:
            raise ValueError(f"data.crop={self.crop}: the crop must have at least one pixel")
        if self.crop > self.resize:
            raise ValueError(
                f"crop {self.crop} is larger than the resized image ({self.resize}): "
                "set data.resize to at least data.crop"
            )


def image_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    """Turn an RGB image into a float32 tensor.

    Args:
        preprocessing: sizes, interpolation and normalisation.

    Returns:
        A picklable function from a PIL image to a tensor (3, crop, crop).
    """
    declare_missing_operators()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(
                preprocessing.resize, transforms.InterpolationMode(preprocessing.interpolation)
            ),
            transforms.CenterCrop(preprocessing.crop),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
