"""Train a classifier of torchvision or timm from random weights on a folder of images.

python scripts/train_zoo.py mobilenet_v2 --data imagenette --output mobilenet_v2.safetensors

The folder has ImageNet's layout, DIR/train/<class>/* and DIR/val/<class>/*. The result is for
`run.py model.weights=FILE`. After an interruption the same command goes on where it was.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from experiments import models
from experiments.cache import load_state, save_state
from experiments.config import ImageFolderConfig, ModelConfig
from experiments.data.images import ImageFiles, Sample, existing_folder, folder_samples
from experiments.data.preprocessing import Preprocessing, image_transform
from experiments.evaluate.vision import accuracy, predict
from experiments.models import digits
from experiments.overrides import one_line
from jlcm.architecture import Architecture

_VERSION = 1  # change it whenever the training below changes: kept states are then refused
_IMAGE_SIZE = 128  # pixels, for networks that take any size


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on which files, and how; the weights depend on `settings` alone."""

    options: argparse.Namespace
    architecture: Architecture
    preprocessing: Preprocessing
    recipe: digits.Recipe
    train: list[Sample]
    val: list[Sample]
    settings: dict[str, str]

    @property
    def kept(self) -> Path:
        """The file with the state of an unfinished training."""
        return self.options.output.with_name(f"{self.options.output.name}.training.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, train or go on, write the weights."""
    options = _parse(arguments)
    try:
        device, job = _choose_device(options.device), plan(options)
        if options.output.exists():
            print(f"{options.output} is finished already")
        else:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                top1 = train(job, device)
            print(f"{options.output}: {top1:.2f} % of {len(job.val)} validation images")
        job.kept.unlink(missing_ok=True)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(one_line(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on after the last finished epoch")
    print(
        f"python run.py model.source={options.source} model.name={options.name} "
        f"model.weights={options.output} data=imagenet data.root={options.data} "
        f"data.crop={job.preprocessing.crop} data.resize={job.preprocessing.resize}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the network, for instance mobilenet_v2")
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--source", choices=("torchvision", "timm"), default="torchvision")
    size = f"pixels (default: {_IMAGE_SIZE}, or the network's where it takes no other)"
    parser.add_argument("--image-size", type=int, help=size)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, help="peak learning rate (default: by the layers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    options = parser.parse_args(arguments)
    for name in ("image_size", "epochs", "batch_size", "rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} must be above 0 and finite")
    if min(options.seed, options.workers) < 0:
        parser.error("--seed and --workers must be at least 0")
    return options


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} can't be used ({reason}): use --device cpu") from error


def plan(options: argparse.Namespace) -> Job:
    """Check names, folders and files, before long work.

    Args:
        options: the command line.

    Returns:
        What to do.

    Raises:
        ValueError: an unknown name, options that do not fit, or a file of another training.
        OSError: folders or images are missing, or the output cannot be written.
    """
    if options.output.suffix != ".safetensors" or options.output.is_dir():
        raise ValueError(f"--output {options.output} must name a file that ends in .safetensors")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.output.parent).close()
    model = ModelConfig(source=options.source, name=options.name)
    models.check_name(model)
    own = models.own_preprocessing(model)
    size = _image_size(model, own.crop, options.image_size)
    classes = _class_names(options.data, "train")
    train = folder_samples(options.data, "train", classes=len(classes))
    val = folder_samples(options.data, "val", classes=len(classes))
    if _class_names(options.data, "val") != classes or len(classes) < 2:
        raise ValueError(f"{options.data}: train/ and val/ need the same two or more class folders")
    architecture = models.architecture_of(model, classes=len(classes), image_size=None)
    module = models.build_network(architecture, "meta")
    chosen = digits.choose_recipe(module)
    recipe = replace(
        chosen,
        epochs=options.epochs,
        batch_size=min(options.batch_size, len(train)),
        rate=options.rate or chosen.rate,
    )
    files = "\n".join(f"{os.path.relpath(f, options.data)} {label}" for f, label in train + val)
    settings = {"architecture": asdict(architecture), "image_size": size, **asdict(recipe)}
    settings |= {name: getattr(options, name) for name in ("seed", "workers")}
    settings |= {"images": hashlib.sha256(files.encode()).hexdigest()[:16], "version": _VERSION}
    job = Job(
        options=options,
        architecture=architecture,
        preprocessing=models.overridden(own, ImageFolderConfig(root=options.data, crop=size)),
        recipe=recipe,
        train=train,
        val=val,
        settings={name: json.dumps(value) for name, value in settings.items()},
    )
    for path in (options.output, job.kept):
        if path.exists():
            _check_settings(path, job.settings)
    return job


def _image_size(model: ModelConfig, own: int, asked: int | None) -> int:
    """Choose the size, which run.py leaves as it is for networks with position embeddings."""
    try:
        models.check_input_size(model, asked or _IMAGE_SIZE)
    except ValueError:
        if asked is not None:
            raise ValueError(f"{model.name} takes only --image-size {own}, not {asked}") from None
        return own
    return asked or _IMAGE_SIZE


def _class_names(root: str, part: str) -> list[str]:
    folder = existing_folder(root, "--data") / part
    return sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []


def _check_settings(path: Path, here: dict[str, str]) -> None:
    """Refuse a file that another command has written."""
    try:
        with safe_open(path, "pt") as file:
            there = file.metadata() or {}
    except SafetensorError:
        there = {}
    changed = [f"{k}: {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v]
    if changed:
        what = "; ".join(changed) if "version" in there else "not of this script"
        raise ValueError(
            f"{path} was written by another command ({what}): delete it, or choose another --output"
        )


def train(job: Job, device: torch.device) -> float:
    """Train from random weights, or go on after the last kept epoch, and write the weights.

    On one machine's CPU the result does not depend on interruptions.

    Args:
        job: what to do.
        device: where to train.

    Returns:
        Top-1 accuracy of the written weights on the validation images, in percent.

    Raises:
        FloatingPointError: a gradient is not finite.
        ValueError: the network cannot take the image size, or an image cannot be read.
    """
    torch.manual_seed(job.options.seed)
    module = models.build_network(job.architecture, "cpu").train()
    _try_network(module, job.preprocessing.crop)
    # Outputs of convolutions follow the filters, so the images need no other layout.
    cnn = digits.has_batch_norm(module)
    layout = torch.channels_last if cnn else torch.contiguous_format
    module = module.to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(digits.parameter_groups(module, job.recipe))
    half = digits.half_precision_pays(module, device, job.preprocessing.crop)
    done, epochs = _resume(job, module, optimizer), job.recipe.epochs
    steps = len(job.train) // job.recipe.batch_size
    with tqdm(total=epochs * steps, initial=done * steps, disable=None) as bar:
        for epoch in range(done, epochs):
            start = time.perf_counter()
            loss = _train_epoch(job, module, optimizer, epoch, half, bar)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                top1 = _top1(job, module)
            _keep(job, module, optimizer, epoch + 1)
            bar.set_postfix(loss=f"{loss:.3f}", validation=f"{top1:.2f} %")
            result = f"loss {loss:.3f}, validation {top1:.2f} %"
            tqdm.write(f"epoch {epoch + 1}/{epochs}: {result}, {time.perf_counter() - start:.0f} s")
    state = {name: _rounded(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    top1 = _top1(job, module)
    metadata = job.settings | {"val_top1": str(top1), "resize": str(job.preprocessing.resize)}
    save_state(job.options.output, state, metadata)
    return top1


def _try_network(module: nn.Module, size: int) -> None:
    """Refuse image sizes and networks that would fail, before images are read."""
    try:
        with torch.no_grad():  # on a copy: batch norms gather statistics
            outputs = copy.deepcopy(module)(torch.zeros(2, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip()[:200] or type(error).__name__
        message = f"the network cannot take images of {size} x {size} ({reason}): set --image-size"
        raise ValueError(message) from error
    if not isinstance(outputs, Tensor):
        raise ValueError("this network has several outputs in training: choose another one")


def _train_epoch(job, module, optimizer, epoch, half, bar) -> float:
    """Go through the images once and return the mean loss."""
    recipe, workers, device = job.recipe, job.options.workers, next(module.parameters()).device
    seed = 1_000_003 * job.options.seed + epoch
    torch.manual_seed(seed)  # for dropout
    loader = DataLoader(
        ImageFiles(job.train, _augmentation(job.preprocessing)),
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,  # batch norm cannot use a last batch of a few images
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator().manual_seed(seed),  # for the order, and the workers' seeds
        pin_memory=device.type == "cuda",
    )
    module.train()
    total = 0.0
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        images, labels = images.to(device, non_blocking=True), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = module(images)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the training diverged in epoch {epoch + 1} (gradient norm {norm.item()}): "
                f"use a smaller --rate (now {recipe.rate:g}) and another --output"
            )
        factor = digits.one_cycle(step, recipe.epochs * len(loader), recipe.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * factor
        optimizer.step()
        total += loss.item()
        bar.update()
    return total / len(loader)


def _augmentation(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Cut out a part of at least 35 % of the image, flip it or not, normalise it."""
    from torchvision import transforms  # after jlcm, which declares missing operators

    mode = transforms.InterpolationMode(preprocessing.interpolation)
    steps = [
        transforms.RandomResizedCrop(preprocessing.crop, scale=(0.35, 1.0), interpolation=mode),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]
    return transforms.Compose(steps)


def _top1(job: Job, module: nn.Module) -> float:
    """Classify the validation images as run.py does; the share of right answers in percent."""
    logits, labels = predict(
        module.eval(),
        ImageFiles(job.val, image_transform(job.preprocessing)),
        device=next(module.parameters()).device,
        batch_size=64,
        workers=job.options.workers,
        description="validation",
    )
    return accuracy(logits, labels)["top1"]


def _keep(job: Job, module: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write all that the next epoch starts from; random numbers follow from seed and epoch."""
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        moments = optimizer.state.get(parameter, {})
        state |= {f"{key}.{name}": tensor for key, tensor in moments.items()}
    save_state(job.kept, state, job.settings | {"finished_epochs": str(done)})


def _resume(job: Job, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `_keep` wrote, if anything, and return the number of finished epochs."""
    if not job.kept.exists():
        return 0
    state, metadata = load_state(job.kept)
    module.load_state_dict({name: state[f"model.{name}"] for name in module.state_dict()})
    for name, parameter in module.named_parameters():
        if f"step.{name}" in state:  # parameters that the network does not use have none
            optimizer.state[parameter] = {"step": state[f"step.{name}"]}
            for key in ("exp_avg", "exp_avg_sq"):  # in the parameter's layout, as AdamW has them
                moment = torch.empty_like(parameter, requires_grad=False)
                optimizer.state[parameter][key] = moment.copy_(state[f"{key}.{name}"])
    return int(metadata["finished_epochs"])


def _rounded(tensor: Tensor) -> Tensor:
    """Round to float16, except counters and values beyond its range."""
    half = tensor.half()
    return half if tensor.is_floating_point() and half.isfinite().all() else tensor


if __name__ == "__main__":
    main()
