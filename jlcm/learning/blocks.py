"""Block-wise reconstruction: tune each block of layers to its original's output, in forward order.

What costs no bytes to change (codebooks, scales, biases and norms, optionally the codes) is trained
together by the squared error of the block's output, with inputs from the network as compressed so
far. After BRECQ (Li et al., 2021), which trains the rounding.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.config import Invalid, check_choice
from jlcm.layers import Stored, stored_tensors
from jlcm.learning.calibration import Calibration
from jlcm.learning.forward import PRECISIONS, precision
from jlcm.learning.partition import BlockOutputs, find_blocks
from jlcm.learning.report import OnResult, collector, ignore, in_brief
from jlcm.learning.resume import restore_part, save_part, stage_folder, stored_buffers
from jlcm.learning.trainable import Trainable, attach_trainables, optimizer_of, set_rates


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How blocks are tuned.

    Attributes:
        epochs: passes over the training part of the calibration inputs.
        batch_size: inputs of a step.
        lr: peak learning rate of codebooks and scales, relative to their root mean square.
        lr_vectors: of biases and norms, relative to their root mean square.
        lr_codes: of the latent values, in mean gaps between codewords; 0 keeps the codes.
        weights: packed weights of a block at least; shorter runs are joined to the next.
        held_out: part of the calibration inputs that selects the best epoch.
        memory: bytes of a block's inputs, and as many of its outputs, kept in memory; the rest lies
            on disk.
        precision: of training: "bf16" (autocast), "fp32", or "auto" (bf16 where the processor
            has it).
    """

    epochs: int = 4
    batch_size: int = 32
    lr: float = 1e-3
    lr_vectors: float = 1e-3
    lr_codes: float = 0.0
    weights: int = 2
    held_out: float = 0.1
    memory: int = 3 * 2**29
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("epochs", "batch_size", "weights"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "lr_vectors", "lr_codes"):
            if not 0 <= getattr(self, name) < 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if not 0 < self.held_out <= 0.5 or self.memory < 0:
            raise Invalid("held_out must lie between 0 and 0.5, and memory must not be negative")
        check_choice("precision", self.precision, PRECISIONS)


@dataclass(kw_only=True)
class BlockResult:
    """What learning did to one block.

    Attributes:
        name: its first and last packed weight.
        before: squared error of its output on the held-out inputs, over the output's variance.
        after: the same for what was kept.
        best_epoch: the epoch that was kept, 0 for the state before.
        seconds: that it took.
        restored: whether it was read from the folder of an earlier run.
        curve: training loss of each epoch.
    """

    name: str
    before: float = float("nan")
    after: float = float("nan")
    best_epoch: int = 0
    seconds: float = 0.0
    restored: bool = False
    curve: list[float] = field(default_factory=list)


def learn_blocks(
    packed: nn.Module,
    reference: nn.Module,
    batches: Sequence[Tensor] | Tensor,
    *,
    options: Blocks,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    folder: Path | None = None,
    on_result: OnResult = ignore,
) -> list[BlockResult]:
    """Tune the blocks of a compressed network in place; shapes and bytes stay as they are.

    Args:
        packed: returned by `jlcm.compress`.
        reference: the full-precision network with the same module names and order of neurons.
        batches: calibration inputs, tensors of (inputs, ...); no labels.
        options: of the stage.
        seed: of the order of the steps.
        device: where both networks run and stay.
        progress: show a progress bar.
        folder: where each finished block is written, so that an interrupted run goes on from there,
            and runs that begin alike share what they have in common.
        on_result: called with each result as soon as there is one.

    Returns:
        One result for each block, in forward order.

    Raises:
        ValueError: calibration set empty or too small, a network that is not compressed or that
            torch.fx cannot trace, a loss that is NaN or infinite, or damaged files in the folder.
    """
    device = torch.device(device)
    if next(stored_tensors(packed), None) is None:
        raise ValueError("the network has no packed weights: call jlcm.compress first")
    training = reference.training, packed.training
    calibration = Calibration(
        packed,
        reference,
        batches,
        forward_batch=options.batch_size,
        memory=options.memory,
        positions=1,
        held_out=options.held_out,
        seed=seed,
        device=device,
        folder=folder,
    )
    if calibration.nodes is None:
        raise ValueError("the network cannot be traced into blocks: leave block-wise learning out")
    store = dict(stored_tensors(packed))
    twin = copy.deepcopy(packed).requires_grad_(False)
    blocks = find_blocks(calibration, options.weights)
    results, finish = collector(on_result)
    weights = [block.weights for block in blocks]
    with stage_folder(
        folder, f"{options!r} {seed} {weights}", stored_buffers(store), calibration.inputs
    ) as folder:
        bar = tqdm(blocks, desc="blocks", unit="block", disable=not progress, leave=False)
        for index, block in enumerate(bar):
            codes = options.lr_codes > 0
            members = attach_trainables(twin, packed, reference, codes=codes, names=block.tensors)
            path = None if folder is None else folder / f"{index:04d}.safetensors"
            if path is not None and path.exists():
                metadata = restore_part(path, _buffers(members))
                result = BlockResult(**json.loads(metadata["result"]))
                finish(replace(result, restored=True))
                continue
            began = time.perf_counter()
            result = _Block(calibration, block, twin, members, options, seed + index).train()
            result.seconds = time.perf_counter() - began
            if path is not None:
                save_part(path, _buffers(members), {"result": json.dumps(asdict(result))})
            finish(result)
            bar.set_postfix_str(in_brief(result))
    reference.train(training[0])
    packed.train(training[1])
    return results


class _Block:
    """State of the training of one block."""

    def __init__(self, calibration, block, twin, members, options, seed) -> None:
        self.calibration, self.block, self.options, self.seed = calibration, block, options, seed
        self.modules, self.members = dict(twin.named_modules()), members
        self.end = calibration.nodes[block.stop - 1]
        self.targets = BlockOutputs(calibration, block)

    def train(self) -> BlockResult:
        options, calibration = self.options, self.calibration
        result = BlockResult(name=self.block.name)
        result.before = result.after = self._held_out()
        best = self._state()
        optimizer = optimizer_of(
            self._trainables(),
            lr=options.lr,
            lr_vectors=options.lr_vectors,
            lr_codes=options.lr_codes,
        )
        generator = torch.Generator().manual_seed(self.seed)
        count = len(calibration.inputs)
        for epoch in range(options.epochs):
            total = 0.0
            for step, number in enumerate(torch.randperm(count, generator=generator).tolist()):
                rows = ~calibration.held(number)
                if not bool(rows.any()):
                    continue
                loss = self._loss(number, rows, train=True)
                optimizer.zero_grad()
                loss.backward()
                if not loss.isfinite():
                    raise ValueError(f"the loss of {result.name} is NaN or infinite: lower the lr")
                set_rates(optimizer, (epoch + (step + 0.5) / count) / options.epochs)
                optimizer.step()
                for trainable in self._trainables():
                    trainable.project()
                total += loss.item()
            result.curve.append(total / count)
            for trainable, stored in self.members.values():
                trainable.write(stored)
            error = self._held_out()
            if error < result.after:
                result.after, result.best_epoch, best = error, epoch + 1, self._state()
        self._restore(best)
        return result

    def _trainables(self) -> list[Trainable]:
        return [trainable for trainable, _ in self.members.values()]

    def _loss(self, number: int, rows: Tensor, *, train: bool) -> Tensor:
        """Squared error of some inputs of a batch over the variance of the block's output."""
        calibration = self.calibration
        state = calibration.state(number, model=0, rows=rows)
        if not train:
            calibration.run(0, state, self.block.start, self.block.stop)
        else:
            with torch.enable_grad(), precision(self.options.precision, calibration.device):
                calibration.run(0, state, self.block.start, self.block.stop, modules=self.modules)
        target = self.targets[number][rows].to(calibration.device)
        return (state[self.end].float() - target).square().mean() / self.targets.variance

    @torch.no_grad()
    def _held_out(self) -> float:
        total = count = 0.0
        for number in range(len(self.calibration.inputs)):
            rows = self.calibration.held(number)
            if bool(rows.any()):
                total += float(self._loss(number, rows, train=False)) * int(rows.sum())
                count += int(rows.sum())
        return total / max(count, 1)

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in _buffers(self.members).items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in _buffers(self.members).items():
            tensor.copy_(state[name])


def _buffers(members: dict[str, tuple[Trainable, Stored]]) -> dict[str, Tensor]:
    """Buffers of a block's stored tensors by name."""
    return {f"{n}:{part}": t for n, (_, s) in members.items() for part, t in s.named_buffers()}
