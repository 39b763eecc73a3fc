"""Training on the digits, once per architecture and seed; later runs read the cached network."""

import hashlib
import json
import logging
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from experiments.cache import cache_folder, load_state, save_state
from experiments.config import DigitsConfig
from experiments.data.digits import (
    TensorImages,
    digits_images,
    digits_preprocessing,
    split_digits,
)
from jlcm.architecture import Architecture
from jlcm.learning.forward import computes_bf16
from jlcm.locks import once

_log = logging.getLogger(__name__)

#: Part of the cache's key: change it whenever the training below changes.
_VERSION = 3
#: A test accuracy below this hints at a training that failed.
_EXPECTED = 0.97


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training; a one-cycle cosine schedule with AdamW.

    Attributes:
        epochs: passes over the training images.
        rate: peak learning rate.
        warm_up: part of the steps in which the rate rises from zero.
        weight_decay: AdamW's, on matrices and filters only.
        batch_size: images per step.
        clip: largest norm of the gradient.
    """

    epochs: int
    rate: float
    warm_up: float = 0.2
    weight_decay: float = 0.05
    batch_size: int = 64
    clip: float = 1.0


def choose_recipe(module: nn.Module) -> Recipe:
    """Choose the settings by the kind of layers, each the shortest that was found to work.

    Args:
        module: the network, on any device.

    Returns:
        The settings.
    """
    if not has_batch_norm(module):
        large = sum(p.numel() for p in module.parameters()) > 40e6
        return Recipe(epochs=20, rate=1e-4) if large else Recipe(epochs=40, rate=5e-4)
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels
        for m in module.modules()
    )
    return Recipe(epochs=30, rate=3e-3) if depthwise else Recipe(epochs=12, rate=1e-3)


def trained_on_digits(
    architecture: Architecture, data: DigitsConfig, *, seed: int, device: torch.device
) -> nn.Module:
    """Train a network on the digits' training part, or read the cached one.

    Args:
        architecture: the network, with 10 classes.
        data: image size, and epochs if not the recipe's.
        seed: seed of the split, the initial weights and the order of images.
        device: where the training runs.

    Returns:
        The network on the CPU, float32.

    Raises:
        ValueError: the cached file is damaged.
    """
    recipe = choose_recipe(architecture.build())
    if data.epochs is not None:
        if data.epochs < 1:
            raise ValueError(f"data.epochs={data.epochs}: at least one epoch is needed")
        recipe = Recipe(**{**asdict(recipe), "epochs": data.epochs})
    key = {
        "architecture": asdict(architecture),
        "image_size": data.image_size,
        "recipe": asdict(recipe),
        "seed": seed,
        "version": _VERSION,
    }
    path = _cached_path(architecture, key)
    with once(path) as missing:
        if missing:
            module = train(architecture, recipe, data.image_size, seed=seed, device=device)
            test = digits_images(split_digits(seed).test, digits_preprocessing(data.image_size))
            found = {"key": json.dumps(key), "test_accuracy": str(_accuracy(module, test))}
            save_state(path, module.state_dict(), found)
    with torch.random.fork_rng(devices=[]):  # for initial weights, which are replaced
        module = architecture.build("cpu")
    state, metadata = load_state(path)
    module.load_state_dict(state)
    accuracy = float(metadata["test_accuracy"])
    _log.info("%s: %.2f %% of the digits' test images, %s", path.stem, 100 * accuracy, path)
    if accuracy < _EXPECTED:
        _log.warning(
            "%s classifies only %.1f %% of the digits' test images: try more data.epochs (now %d)",
            path.stem,
            100 * accuracy,
            recipe.epochs,
        )
    return module


def _cached_path(architecture: Architecture, key: dict) -> Path:
    """Name the cached file after the network and everything that determines its weights."""
    name = architecture.arguments.get("model_name", architecture.builder.partition(":")[2])
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"digits-{re.sub(r'[^A-Za-z0-9_.]', '_', name)}-{digest}.safetensors"


def train(
    architecture: Architecture, recipe: Recipe, image_size: int, *, seed: int, device: torch.device
) -> nn.Module:
    """Train from random weights on the digits' training part.

    Args:
        architecture: the network, with 10 classes.
        recipe: the settings.
        image_size: side of the images in pixels.
        seed: seed of the split, the initial weights, the order of images and their distortion.
        device: where to train.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    images = digits_images(split_digits(seed).train, digits_preprocessing(image_size))
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = architecture.build("cpu").train()
        half = half_precision_pays(module, device, image_size)
        layout = torch.contiguous_format if half else torch.channels_last
        module = module.to(device, memory_format=layout)
        x, y = images.images.to(device), images.labels.to(device)
        # Batch norm cannot use a last batch of a few images, so the rest of an epoch is dropped.
        batch = min(recipe.batch_size, len(x))
        steps = recipe.epochs * (len(x) // batch)
        optimizer = torch.optim.AdamW(parameter_groups(module, recipe), lr=recipe.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: one_cycle(step, steps, recipe.warm_up)
        )
        with tqdm(total=steps, desc=f"training {_name(architecture)}", disable=None) as bar:
            for _ in range(recipe.epochs):
                order = torch.randperm(len(x))
                for chosen in order[: len(order) // batch * batch].split(batch):
                    chosen = chosen.to(device)
                    inputs = _distort(x[chosen]).to(memory_format=layout)
                    with torch.autocast(device.type, torch.bfloat16, enabled=half):
                        logits = module(inputs)
                    loss = functional.cross_entropy(logits.float(), y[chosen])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    norm = nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
                    if not torch.isfinite(norm):
                        raise FloatingPointError(
                            f"training {_name(architecture)} on the digits diverged "
                            f"(gradient norm {norm.item()}): use another seed or model.weights=FILE"
                        )
                    optimizer.step()
                    schedule.step()
                    bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return module.to("cpu", memory_format=torch.contiguous_format).eval()


def _name(architecture: Architecture) -> str:
    """Name the network for the progress bar."""
    return str(architecture.arguments.get("model_name", architecture.builder.partition(":")[2]))


def one_cycle(step: int, steps: int, warm_up: float) -> float:
    """Rise linearly, then fall to zero along a cosine."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict]:
    """Decay matrices and filters; leave biases, norms and tokens alone."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _distort(images: torch.Tensor) -> torch.Tensor:
    """Rotate, scale and shift each image a little (at most 8 degrees, 8 % and 10 %).

    Args:
        images: (batch, 3, height, width).

    Returns:
        Images of the same shape.
    """
    # On the CPU, so that the numbers do not depend on the device.
    angle, scale = (torch.rand(2, len(images)) * 2 - 1) * torch.tensor([[0.14], [0.08]])
    shift = (torch.rand(len(images), 2) * 2 - 1) * 0.2  # coordinates run from -1 to 1
    cosine, sine = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    rows = [
        torch.stack([cosine, -sine, shift[:, 0]], 1),
        torch.stack([sine, cosine, shift[:, 1]], 1),
    ]
    maps = torch.stack(rows, 1).to(images.device)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def has_batch_norm(module: nn.Module) -> bool:
    """Tell convolutional networks from transformers."""
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def half_precision_pays(module: nn.Module, device: torch.device, size: int) -> bool:
    """Tell whether to train in bfloat16: where the machine computes in it, but not depthwise.

    Measured on a CPU with AVX-512 BF16: a ViT's steps take 0.6 times as long, at 128 pixels those
    of ResNet-18 and -50 too, MobileNetV2's as long, EfficientNet-B0's 1.6 times as long. Small
    images are left alone, since oneDNN's bfloat16 gradients of filters on 1 x 1 images were not
    always finite (torch 2.13).

    Args:
        module: the network.
        device: where it is trained.
        size: side of the images in pixels.
    """
    if not computes_bf16(device):
        return False
    if device.type == "cuda" or not has_batch_norm(module):
        return True
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return size >= 64 and not any(m.groups == m.in_channels > 1 for m in convolutions)


@torch.inference_mode()
def _accuracy(module: nn.Module, images: TensorImages) -> float:
    """Share of images that the network classifies correctly."""
    logits = torch.cat([module(batch) for batch in images.images.split(64)])
    return (logits.argmax(1) == images.labels).float().mean().item()
