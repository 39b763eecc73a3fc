"""End-to-end distillation: tune a compressed network to its original's outputs, without labels.

Everything that costs no bytes to change is trained together, by the Kullback-Leibler divergence of
the network's output distribution from the original's (Hinton, Vinyals and Dean, "Distilling the
knowledge in a neural network", 2015): codebooks, scales, biases and norms, and optionally the
codes, whose latent values move by the straight-through gradient (Bengio, Leonard and Courville,
2013). The stage is ours, beyond the paper.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.config import Invalid, check_choice
from jlcm.layers import stored_tensors
from jlcm.learning.forward import (
    PRECISIONS,
    augment,
    distribution_of,
    divergence,
    divergences,
    logits_of,
    output_parts,
    outputs_of,
    precision,
    split_sequences,
    to_device,
)
from jlcm.learning.report import OnResult, ignore
from jlcm.learning.resume import read_part, save_part, stage_folder, stored_buffers
from jlcm.learning.trainable import (
    StandIn,
    Trainable,
    optimizer_of,
    set_rates,
    trainable_copy,
)
from jlcm.packed import PackedWeight
from jlcm.packing import unpack

CHECKPOINT = "distill.safetensors"


@dataclass(frozen=True, kw_only=True)
class Distill:
    """How a compressed network is tuned end to end.

    Attributes:
        epochs: passes over the training part of the calibration inputs, 0 to leave the stage out.
        batch_size: inputs of a step; None for 32, or for 4 sequences of token ids.
        lr: peak learning rate of codebooks and scales, relative to their root mean square; None for
            4e-4, or 1e-3 for sequences of token ids, which have fewer steps. Codebooks of a trellis
            with m bits of memory have 2**(-m / 2) of it.
        lr_vectors: of biases and norms, relative to their root mean square.
        lr_codes: of the latent values, in mean gaps between codewords; 0 keeps the codes. In short
            runs on a ResNet-18, moving them from the start was worse than keeping them.
        codes_start: share of the training, from its beginning, during which the codes stay.
        temperature: of both output distributions, if they are of classes.
        flip: mirror images at random, left to right.
        crop: side in pixels of random windows of the images that are trained on, None for whole
            images. The original sees the same windows.
        zoom: smallest area, as share of the image, of random windows that are resized to the
            image's size; 1 for none.
        mix: blend images in random proportions; the original sees the same blends.
        holdout: share of the inputs that only select the best epoch.
        precision: of training: "bf16" (autocast), "fp32", or "auto" (bf16 where the processor
            has it).
    """

    epochs: int = 8
    batch_size: int | None = None
    lr: float | None = None
    lr_vectors: float = 4e-4
    lr_codes: float = 0.0
    codes_start: float = 0.25
    temperature: float = 1.0
    flip: bool = True
    crop: int | None = None
    zoom: float = 0.5
    mix: bool = False
    holdout: float = 0.1
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {"epochs": 0, "batch_size": 1, "crop": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise Invalid(f"{name}={value} must be at least {bound}")
        for name in ("lr", "lr_vectors", "lr_codes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise Invalid(f"{name}={value} must be at least 0 and below 1")
        if not 0 < self.holdout <= 0.5:
            raise Invalid(f"holdout={self.holdout} must lie between 0 and 0.5")
        if not 0 < self.zoom <= 1:
            raise Invalid(f"zoom={self.zoom} must lie between 0 and 1")
        if not 0 <= self.codes_start < 1:
            raise Invalid(f"codes_start={self.codes_start} must be a share between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise Invalid(f"temperature={self.temperature} must be positive")
        check_choice("precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: counted from 1.
        training_loss: mean over its steps, in nats per output row.
        held_out_loss: after it, of the network as it is stored.
        seconds: that it took; NaN where it was restored.
        restored: whether it was read from the folder of an earlier run.
    """

    epoch: int
    training_loss: float
    held_out_loss: float
    seconds: float = float("nan")
    restored: bool = False


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What the stage did.

    Attributes:
        initial_loss: mean Kullback-Leibler divergence (nats per output row) of the held-out
            inputs before.
        final_loss: after; equal to the initial one if nothing improved beyond doubt.
        best_epoch: epoch whose state was kept, counted from 1; 0 for the initial state.
        history: per epoch, mean training loss and held-out loss.
        moved_codes: share of the codes that differ from the initial ones.
    """

    initial_loss: float
    final_loss: float
    best_epoch: int
    history: list[tuple[float, float]] = field(default_factory=list)
    moved_codes: float = 0.0


def distill(
    packed: nn.Module,
    reference: nn.Module,
    batches: Sequence[Tensor] | Tensor,
    *,
    options: Distill,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    folder: Path | None = None,
    stand_in: StandIn | None = None,
    before_step: Callable[[float], None] | None = None,
    on_result: OnResult = ignore,
) -> DistillResult:
    """Tune a compressed network in place; its shapes and bytes stay as they are.

    After each epoch the state is rounded as it is stored, and the best state by the held-out inputs
    is kept, if it is better than the initial one by more than the standard error of the difference.

    Args:
        packed: returned by `jlcm.compress`.
        reference: the original network, of the same architecture. Left as it is.
        batches: calibration inputs, (n, ...) or batches of them, as the network takes them. Windows
            and mirror images are made of floating (n, channels, height, width) only.
        options: of the stage.
        seed: of the held-out part, the order of the inputs, windows and mirror images.
        device: where it runs; the network returns to the device it was on.
        progress: show a progress bar.
        folder: where each finished epoch is kept. A run that was interrupted continues there when
            it is called with the same arguments, and ends with the same result.
        stand_in: makes what is trained in the place of each packed weight, None for its codebooks,
            scales and, with `lr_codes`, codes. Not with a folder, which cannot tell them apart.
        before_step: called before each step with the share of the training that is done.
        on_result: called with each `EpochResult` as soon as there is one.

    Returns:
        Losses before and after.

    Raises:
        ValueError: `packed` is not compressed, fewer than two inputs, outputs that are not tensors
            of equal shape, a non-finite loss, a damaged file in the folder, or `stand_in` with a
            folder. `packed` is then as it was.
    """
    device = torch.device(device)
    inputs = _joined(batches)
    if next(stored_tensors(packed), None) is None:
        raise ValueError("only a network that jlcm.compress returned can be distilled")
    if stand_in is not None and folder is not None:
        raise ValueError("a run with stand_in keeps nothing in a folder: leave one of them out")
    _check_crop(options, inputs)
    initial, home = _snapshot(packed), next(packed.buffers()).device
    was_training = packed.training
    packed.to(device).eval()
    reference = copy.deepcopy(reference).to(device).eval().requires_grad_(False)
    store = dict(stored_tensors(packed))
    try:
        with stage_folder(folder, f"{options!r} {seed}", stored_buffers(store), [inputs]) as folder:
            run = _Run(
                packed, reference, inputs, options, seed, device, folder, stand_in, before_step
            )
            return run.train(progress, on_result)
    except BaseException:
        _restore(packed, initial)
        raise
    finally:
        packed.to(home).train(was_training)


class _Run:
    """State of one run: trainable copy, optimiser, best state so far."""

    def __init__(
        self, packed, reference, inputs, options, seed, device, folder, stand_in, before_step
    ) -> None:
        self.packed, self.reference, self.inputs = packed, reference, inputs
        self.options, self.seed, self.device = options, seed, device
        self.distribution = distribution_of(reference)
        sequences = not inputs.is_floating_point()
        self.batch_size = options.batch_size or (4 if sequences else 32)
        self.lr = (1e-3 if sequences else 4e-4) if options.lr is None else options.lr
        self.before_step = before_step or (lambda done: None)
        held, trained = _split(len(inputs), options.holdout)
        self.trained, self.held = trained, inputs[held]
        self.targets = outputs_of(reference, self.held, device, "the original network")
        self.initial = _snapshot(packed)
        self.path = None if folder is None else folder / CHECKPOINT
        self.twin, self.trainables = trainable_copy(
            packed, reference, codes=options.lr_codes > 0, stand_in=stand_in
        )
        self.optimizer = optimizer_of(
            self._members(),
            lr=self.lr,
            lr_vectors=options.lr_vectors,
            lr_codes=options.lr_codes,
        )
        self.epoch, self.history = 0, []
        self.initial_losses = self._held_out_losses()
        self.initial_loss = self.best_loss = self.initial_losses.mean().item()
        self.best, self.best_epoch = self.initial, 0

    def train(self, progress: bool, on_result: OnResult) -> DistillResult:
        if self.path is not None and self.path.exists():
            self._resume()
        for epoch, (trained, loss) in enumerate(self.history, 1):
            on_result(
                EpochResult(epoch=epoch, training_loss=trained, held_out_loss=loss, restored=True)
            )
        bar = tqdm(
            total=self.options.epochs,
            initial=self.epoch,
            desc="distill",
            unit="epoch",
            disable=not progress,
            leave=False,
        )
        with bar:
            bar.set_postfix(held_out=f"{self.best_loss:.4f}")
            while self.epoch < self.options.epochs:
                began = time.perf_counter()
                trained = self._epoch()
                self._write()
                loss = self._held_out_losses().mean().item()
                self.epoch += 1
                self.history.append((trained, loss))
                if loss < self.best_loss:
                    self.best, self.best_loss = _snapshot(self.packed), loss
                    self.best_epoch = self.epoch
                if self.path is not None:
                    self._save()
                bar.update()
                bar.set_postfix(train=f"{trained:.4f}", held_out=f"{loss:.4f}")
                on_result(
                    EpochResult(
                        epoch=self.epoch,
                        training_loss=trained,
                        held_out_loss=loss,
                        seconds=time.perf_counter() - began,
                    )
                )
        return self._finish()

    def _finish(self) -> DistillResult:
        _restore(self.packed, self.best)
        after = self._held_out_losses()
        loss = after.mean().item()
        if not math.isclose(loss, self.best_loss, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError(
                f"the network written back has a held-out loss of {loss:.6g}, "
                f"{self.best_loss:.6g} was measured: its outputs are not reproducible"
            )
        gains = self.initial_losses - after
        if len(gains) > 1 and gains.mean() <= gains.std() / len(gains) ** 0.5:
            _restore(self.packed, self.initial)
            self.best_epoch, self.best_loss = 0, self.initial_loss
        return DistillResult(
            initial_loss=self.initial_loss,
            final_loss=self.best_loss,
            best_epoch=self.best_epoch,
            history=self.history,
            moved_codes=self._moved_codes(),
        )

    def _epoch(self) -> float:
        options = self.options
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch + 1))
        order = self.trained[torch.randperm(len(self.trained), generator=generator)]
        batches = order.tensor_split(-(-len(order) // self.batch_size))
        total = 0.0
        for step, batch in enumerate(batches):
            x = augment(
                self.inputs[batch],
                generator,
                flip=options.flip,
                crop=options.crop,
                zoom=options.zoom,
                mix=options.mix,
            )
            done = (self.epoch + (step + 0.5) / len(batches)) / options.epochs
            self.before_step(done)
            self.optimizer.zero_grad()
            loss = sum(self._backward(part, len(x)) for part in split_sequences(x, len(x)))
            self._check_finite(loss)
            set_rates(self.optimizer, done, options.codes_start)
            self.optimizer.step()
            for trainable in self._members():
                trainable.project()
            total += loss.item() * len(batch)
        return total / len(order)

    def _backward(self, x: Tensor, count: int) -> Tensor:
        """Add the gradient of some of a step's `count` inputs; their share of its loss."""
        x = to_device(x, self.device)
        with precision(self.options.precision, self.device):
            with torch.no_grad():
                target = logits_of(self.reference(x), "the original network")
            output = logits_of(self.twin(x), "the compressed network")
        loss = divergence(output, target, self.options.temperature, self.distribution)
        loss = loss * (len(x) / count)
        loss.backward()
        return loss.detach()

    def _check_finite(self, loss: Tensor) -> None:
        gradients = [p.grad for p in self.twin.parameters() if p.grad is not None]
        if not (loss.isfinite() and torch.nn.utils.get_total_norm(gradients).isfinite()):
            raise ValueError(
                f"the distillation loss or its gradient is NaN or Inf in epoch {self.epoch + 1}: "
                f"lower lr={self.lr:g}, or set precision=fp32"
            )

    def _members(self) -> list[Trainable]:
        return [trainable for trainable, _ in self.trainables.values()]

    def _write(self) -> None:
        for trainable, stored in self.trainables.values():
            trainable.write(stored)

    def _held_out_losses(self) -> Tensor:
        """(rows,) divergence of each output row of the held-out inputs."""
        losses, targets = [], self.targets
        for output in output_parts(self.packed, self.held, self.device, "the compressed network"):
            target, targets = targets[: len(output)], targets[len(output) :]
            if output.shape != target.shape:
                raise ValueError(
                    f"the compressed network's outputs have shape {tuple(output.shape)}, "
                    f"the original's {tuple(target.shape)}: give the network it was made from"
                )
            losses.append(divergences(output, target, self.distribution))
        return torch.cat(losses)

    def _moved_codes(self) -> float:
        moved = count = 0
        for name, (_, stored) in self.trainables.items():
            if isinstance(stored, PackedWeight):
                before = self.initial.get(f"{name}:codes", self.initial.get(f"{name}:base.codes"))
                initial = unpack(before, stored.bits, stored.count)
                moved += int((initial != stored.unpack_codes().cpu()).sum())
                count += stored.count
        return moved / max(count, 1)

    def _save(self) -> None:
        tensors = {f"best:{name}": t for name, t in self.best.items()}
        for name, parameter in self._parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam:{name}:{key}": value for key, value in state.items()}
            tensors[f"parameter:{name}"] = parameter.detach()
        progress = {
            "epoch": self.epoch,
            "history": self.history,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
        }
        save_part(self.path, tensors, {"progress": json.dumps(progress)})

    @torch.no_grad()
    def _resume(self) -> None:
        metadata, tensors = read_part(self.path)
        for name, value in json.loads(metadata["progress"]).items():
            setattr(self, name, value)
        self.history = [tuple(losses) for losses in self.history]
        self.best = {
            n.removeprefix("best:"): t for n, t in tensors.items() if n.startswith("best:")
        }
        for name, parameter in self._parameters():
            parameter.copy_(tensors[f"parameter:{name}"])
            state = _under(f"adam:{name}:", tensors)
            if state:
                step = state.pop("step")
                moments = {key: value.to(self.device) for key, value in state.items()}
                self.optimizer.state[parameter] = {"step": step, **moments}
        for trainable in self._members():
            trainable.project()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, (trainable, _) in self.trainables.items():
            for part, parameter in trainable.named_parameters():
                yield f"{name}:{part}", parameter


def _joined(batches: Sequence[Tensor] | Tensor) -> Tensor:
    parts = [batches] if isinstance(batches, Tensor) else list(batches)
    inputs = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0)
    if len(inputs) < 2:
        raise ValueError(
            f"distillation needs at least 2 calibration inputs, got {len(inputs)}: one part "
            "trains, the other selects the best epoch"
        )
    if inputs.is_floating_point() and not inputs.isfinite().all():
        raise ValueError("the calibration inputs contain NaN or Inf")
    return inputs


def _check_crop(options: Distill, inputs: Tensor) -> None:
    if options.crop is not None and inputs.dim() == 4 and options.crop > min(inputs.shape[-2:]):
        raise Invalid(f"crop={options.crop} is larger than the images {tuple(inputs.shape[-2:])}")


def _split(count: int, holdout: float) -> tuple[Tensor, Tensor]:
    """Held-out and training inputs, the same as in layer-wise learning."""
    every = max(2, round(1 / holdout))
    held = torch.arange(count) % every == every - 1
    held[-1] |= not held.any()
    return held.nonzero().view(-1), (~held).nonzero().view(-1)


def _mixed(seed: int, index: int) -> int:
    """Seed of one of several streams of random numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest())


def _snapshot(packed: nn.Module) -> dict[str, Tensor]:
    """Copies of all stored buffers on the CPU, as "name of the tensor:buffer"."""
    return {
        f"{name}:{part}": buffer.detach().cpu().clone()
        for name, stored in stored_tensors(packed)
        for part, buffer in stored.named_buffers()
    }


def _restore(packed: nn.Module, state: dict[str, Tensor]) -> None:
    for name, stored in stored_tensors(packed):
        for part, buffer in list(stored.named_buffers()):
            owner, _, leaf = part.rpartition(".")
            value = state[f"{name}:{part}"].to(buffer.device, copy=True)
            setattr(stored.get_submodule(owner), leaf, value)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
