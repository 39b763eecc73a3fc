"""Pictures of coloured digits with captions: scikit-learn's digits, drawn at 32 x 32 pixels.

A caption says which digit is drawn, in which colour, on which background, and how thick. Some
combinations of the four are never trained on: prompts for the evaluation come from them.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from experiments.data.digits import split_digits

SIZE = 32  # pixels
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Red, green and blue between 0 and 1.
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.60, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.10, 0.70),
    "cyan": (0.10, 0.80, 0.85),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
#: The darkness from which on a point belongs to the digit, between 0 and 1.
STROKES = {"thin": 0.62, "medium": 0.42, "bold": 0.27}
TEMPLATES = (
    "a {stroke} {colour} {digit} on a {background} background",
    "the digit {digit} in {colour}, {stroke}, on {background}",
    "a {background} picture of a {stroke} {colour} {digit}",
    "{background} paper with a {colour} {digit} in {stroke} strokes",
)
#: Combinations that are kept for the evaluation, the same number of each digit.
HELD_OUT = 240
_SHARPNESS = 16.0  # of the digit's edge
_TINT = 0.05  # colours vary by so much


class Caption(NamedTuple):
    """What is drawn; the values are positions in `DIGITS`, `COLOURS` and `STROKES`."""

    digit: int
    colour: int
    background: int
    stroke: int


#: Number of values of each field.
CLASSES = Caption(len(DIGITS), len(COLOURS), len(COLOURS), len(STROKES))


def split_captions() -> tuple[list[Caption], list[Caption]]:
    """All 1,680 combinations, those to train on and the `HELD_OUT` others.

    Returns:
        The two lists, always the same, each shuffled; in the second the digits take turns.
    """
    order = np.random.default_rng(0)
    train, held_out = [], []
    for digit in range(len(DIGITS)):
        found = [
            Caption(digit, *rest)
            for rest in itertools.product(*map(range, CLASSES[1:]))
            if rest[0] != rest[1]
        ]
        found = [found[i] for i in order.permutation(len(found))]
        held_out.append(found[: HELD_OUT // len(DIGITS)])
        train += found[HELD_OUT // len(DIGITS) :]
    train = [train[i] for i in order.permutation(len(train))]
    return train, [caption for turn in zip(*held_out, strict=True) for caption in turn]


def prompt(caption: Caption, template: int = 0) -> str:
    """The caption in words."""
    colours = list(COLOURS)
    return TEMPLATES[template % len(TEMPLATES)].format(
        digit=DIGITS[caption.digit],
        colour=colours[caption.colour],
        background=colours[caption.background],
        stroke=list(STROKES)[caption.stroke],
    )


def grey_digits(part: str) -> tuple[Tensor, Tensor]:
    """Pixels of handwritten digits between 0 and 1, float32 (samples, 8, 8), and their labels.

    Args:
        part: "train", "calibration" or "test" of `experiments.data.digits.split_digits`.
    """
    bunch, positions = load_digits(), getattr(split_digits(seed=0), part)
    labels = torch.from_numpy(bunch.target[positions]).long()
    return torch.from_numpy(bunch.images[positions]).float() / 16, labels


def draw(
    captions: Sequence[Caption], pixels: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw each caption with a random handwritten digit, at a random place, size and angle.

    Args:
        captions: what to draw.
        pixels: handwritten digits, float32 (samples, 8, 8) between 0 and 1.
        labels: int64 (samples,); every digit of the captions must be among them.
        generator: on the CPU.

    Returns:
        Pictures, float32 (captions, 3, 32, 32) between 0 and 1.
    """
    count = len(captions)
    values = torch.tensor(captions)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    # The n-th digit of its class, n random.
    order = labels.argsort(stable=True)
    sizes = labels.bincount(minlength=len(DIGITS))
    starts = sizes.cumsum(0) - sizes
    chosen = (torch.rand(count, generator=generator) * sizes[values[:, 0]]).long()
    digits = pixels[order[starts[values[:, 0]] + chosen]]

    # From the picture's coordinates to the digit's; outside the digit there is paper.
    angle, scale = 0.14 * uniform(), 1.3 * (1 + 0.1 * uniform())
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    maps = torch.cat([rows * scale.view(-1, 1, 1), 0.2 * uniform(2, 1)], 2)
    grid = functional.affine_grid(maps, [count, 1, SIZE, SIZE], align_corners=False)
    grey = functional.grid_sample(digits.unsqueeze(1), grid, mode="bicubic", align_corners=False)
    threshold = torch.tensor(list(STROKES.values()))[values[:, 3]].view(-1, 1, 1, 1)
    ink = ((grey - threshold) * _SHARPNESS).sigmoid()

    palette = torch.tensor(list(COLOURS.values()))
    colour, paper = (
        (palette[values[:, i]] + _TINT * uniform(3)).clamp(0, 1).view(-1, 3, 1, 1) for i in (1, 2)
    )
    return paper + ink * (colour - paper)
