"""How much errors of each weight change the network's output, and bits shared out accordingly.

To second order, the Kullback-Leibler divergence of a network from its original is half the squared
error of the weights weighted by the Fisher information, whose diagonal is estimated here on
unlabelled inputs. SqueezeLLM (Kim et al., 2024) weights its k-means by the same quantity.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.clustering.scalar import assign, cluster
from jlcm.decoder import recorded_layers, skipped_layers
from jlcm.learning.calibration import split_inputs
from jlcm.learning.forward import (
    distribution_of,
    divergence,
    logits_of,
    outputs_of,
    running,
    to_device,
)
from jlcm.learning.products import Product, noting_calls, watching_products
from jlcm.learning.resume import read_part, save_part, stage_folder
from jlcm.rotation import rotate, rotate_squares, unrotate
from jlcm.select import as_matrix

#: Of `estimate_distortions`; what another one has kept is not read.
VERSION = 3
#: Inputs that the estimate uses at most: sums over whole tensors settle long before.
MOST_INPUTS = 256
#: Inputs of a step. Few, because the square of a sum over many inputs varies more.
STEP = 4
#: Weights of a tensor that are clustered to estimate its error; rotated ones are nearly normal, so
#: that fewer tell it.
MOST_WEIGHTS, MOST_ROTATED = 2**16, 2**14
#: Widths of a code that are clustered; each further bit quarters the error.
CLUSTERED_BITS = 5
#: Widths whose divergence is measured, because errors are too large to predict it.
MEASURED_BITS = 2
#: What one-bit layers do together is more than the sum of what each does alone: their divergence
#: counts so many times. On EfficientNet-Lite0 at alpha 7.5 it lowered the divergence after
#: layer-wise learning from 0.96 to 0.52 on held-out inputs. The last layer is left out, because no
#: other passes its errors on.
ONE_BIT = 4.0
#: Inputs that it is measured on.
MEASURED_INPUTS = 32
#: The same for sequences of token ids: tokens together, and of each sequence.
MOST_TOKENS, MEASURED_TOKENS, MEASURED_LENGTH = 2**14, 128, 64
#: Tokens that suffice where only sums over whole tensors count.
SUMMED_TOKENS = 2**13
#: Inputs of a neuron whose correlations are looked at.
MOST_COLUMNS = 2048


def fisher_information(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    inputs: Sequence[Tensor] | Tensor,
    *,
    tokens: int = MOST_TOKENS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of each weight, per input.

    Labels are drawn from the network's own output distribution (`OutputDistribution.drawn`). Their
    gradients have mean zero, so the square of a sum over several inputs is, in the mean, the sum of
    the squares.

    Args:
        model: returns logits (n, ..., classes), which count for each position, or means of normal
            distributions (`jlcm.learning.forward.distribution_of`).
        weights: parameters of the model by name.
        inputs: unlabelled calibration inputs (n, ...) or batches of them.
        tokens: that it uses at the most, if the inputs are sequences of token ids.
        seed: of the labels.
        device: where it runs; the model stays there.
        progress: show a progress bar.

    Returns:
        By name a float32 tensor of the parameter's shape, on the CPU.

    Raises:
        ValueError: no inputs, outputs that are not logits, or gradients that are NaN or infinite.
    """
    steps = _first(inputs, MOST_INPUTS, STEP)
    if not steps[0].is_floating_point():  # a sequence has as many outputs as tokens
        steps = _first(inputs, max(tokens // steps[0][0].numel(), 1), 1)
    device = torch.device(device)
    model.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}

    def adds(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            gradient = weight.grad.float()
            total.addcmul_(gradient, gradient)
            weight.grad = None  # one gradient at a time

        return add

    bar = tqdm(steps, desc="sensitivity", unit="step", disable=not progress, leave=False)
    with _frozen(model), ExitStack() as hooks:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.callback(weight.register_post_accumulate_grad_hook(adds(sums[name])).remove)
        for x in bar:
            _log_likelihood(model, x, generator, device).backward()
    count = sum(map(len, steps))
    found = {name: (total / count).cpu() for name, total in sums.items()}
    if not all(values.isfinite().all() for values in found.values()):
        raise ValueError("gradients on the calibration inputs are NaN or infinite")
    return found


def position_weights(
    model: nn.Module,
    modules: Collection[str],
    inputs: Sequence[Tensor],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """How much errors at each position of a layer's output change the network's output.

    It is the squared gradient of the log-likelihood under the network's own output distribution
    (`OutputDistribution.drawn`), mean over the rows (GuidedQuant, Kim et al., 2025, with one group
    of rows).

    Args:
        model: as for `fisher_information`.
        modules: names of linear layers and convolutions that run once; others are passed over.
        inputs: batches of calibration inputs.
        seed: of the labels.
        device: where it runs; the model stays there.
        progress: show a progress bar.

    Returns:
        By name of module (n, positions) float32 on the CPU, of mean 1. The largest thousandth is
        cut to the least of them, because single tokens would outweigh all others.

    Raises:
        ValueError: outputs that are not as for `fisher_information`.
    """
    device = torch.device(device)
    model.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def after(module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            dim = -1 if isinstance(module, nn.Linear) else 1

            def see(gradient: Tensor) -> None:
                squares = gradient.float().square().mean(dim)
                # Not len(output): the output would hold what holds it, and its graph stay alive.
                found.setdefault(name, []).append(squares.reshape(len(gradient), -1).cpu())

            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(see)
            return output

        return after

    steps = [part for batch in inputs for part in batch.split(1)]
    bar = tqdm(steps, desc="positions", unit="input", disable=not progress, leave=False)
    with _frozen(model), ExitStack() as hooks:
        for name in modules:
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        for x in bar:
            _log_likelihood(model, x, generator, device).backward()
    weights = {}
    for name, parts in found.items():
        values = torch.cat(parts)
        if len(values) == len(steps):  # it ran once for each input
            most = values.flatten().kthvalue(max(round(0.999 * values.numel()), 1)).values
            values = values.clamp(max=most)
            weights[name] = values / values.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return weights


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters; what requires them is as before afterwards."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)


@torch.enable_grad()
def _log_likelihood(
    model: nn.Module, x: Tensor, generator: torch.Generator, device: torch.device
) -> Tensor:
    """`OutputDistribution.drawn` of the network's outputs."""
    with running(x, device):
        logits = logits_of(model(to_device(x, device)), "the network").float()
    if not logits.isfinite().all():
        raise ValueError("outputs on the calibration inputs contain NaN or Inf")
    return distribution_of(model).drawn(logits.flatten(0, -2), generator)


def estimate_distortions(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    inputs: Sequence[Tensor] | Tensor,
    fisher: dict[str, Tensor],
    *,
    most_bits: int,
    learned: bool,
    rotated: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, list[float]]:
    """Estimated divergence of the network when one weight is coded with 1, 2, ... bits.

    Narrow codes are measured: the network runs with that one weight coded. Wider ones are predicted
    from the Fisher information, which is accurate where errors are small. Both count the error of
    plain clustering. Learning leaves of it what other inputs of a neuron cannot make up for: the
    conditional variance of its inputs, over their mean square.

    Args:
        model: as for `fisher_information`.
        weights: parameters of the model by name.
        inputs: unlabelled calibration inputs (n, ...) or batches of them.
        fisher: of `fisher_information`.
        most_bits: widest code.
        learned: whether layers are learned afterwards.
        rotated: whether rows are rotated before they are encoded.
        seed: of sampled positions.
        device: where it runs; the model stays there.
        progress: show a progress bar.

    Returns:
        By name the divergences of 1 to `most_bits` bits, descending. That of one bit is multiplied
        by `ONE_BIT`, but for the layer that runs last.
    """
    device = torch.device(device)
    model.to(device).eval()
    batches = [to_device(x, device) for x in _first(inputs, MOST_INPUTS, MEASURED_INPUTS)]
    x, outputs = batches[0], 1
    if not x.is_floating_point():
        outputs = x[0].numel()  # of an input, which the Fisher information sums up
        x = x[: MEASURED_TOKENS // MEASURED_LENGTH, :MEASURED_LENGTH]
        batches = [to_device(b, device) for b in _first(inputs, MEASURED_INPUTS, 4)]
    parts = dict.fromkeys(weights, 1.0)
    if learned:
        parts = unexplained_parts(model, weights, batches, rotated=rotated, seed=seed)
    owners = {name.rpartition(".")[0] for name in weights}
    with (
        recorded_layers(model) as states,
        running(x, device),
        noting_calls(model, owners) as calls,
    ):
        target = outputs_of(model, x, device, "the network")
    found = {}
    bar = tqdm(weights.items(), desc="allocation", unit="layer", disable=not progress, leave=False)
    for name, weight in bar:
        original = weight.detach().clone()
        harm: list[float] = []
        for bits in range(1, most_bits + 1):
            if bits > CLUSTERED_BITS:
                harm.append(harm[-1] / 4)
                continue
            coded = _clustered(original, fisher[name], bits, rotated)
            error = fisher[name].double() * (coded - original.cpu()).double().square()
            divergence_ = 0.5 * float(error.sum()) / outputs
            if bits <= MEASURED_BITS:
                weight.data.copy_(coded)
                try:
                    with skipped_layers(model, states, name), running(x, device):
                        output = outputs_of(model, x, device, "the network")
                    measured = divergence(output, target, distribution=distribution_of(model))
                finally:
                    weight.data.copy_(original)
                divergence_ = max(divergence_, measured.item())
            harm.append(min([divergence_, *harm[-1:]]))
        if name.rpartition(".")[0] not in calls[-1:]:
            harm[0] *= ONE_BIT
        found[name] = [parts[name] * value for value in harm]
    return found


def distortions(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    inputs: Sequence[Tensor] | Tensor,
    *,
    most_bits: int,
    learned: bool,
    rotated: bool = False,
    fisher: dict[str, Tensor] | None = None,
    folder: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, list[float]]:
    """`estimate_distortions`, kept for runs on other goals and for one that is interrupted.

    Args:
        model: as there.
        weights: as there.
        inputs: as there.
        most_bits: as there.
        learned: as there.
        rotated: as there.
        fisher: of `fisher_information`; None to compute it where it is needed.
        folder: where results are kept; None to keep nothing.
        seed: of sampled labels and positions.
        device: where it runs; the model stays there.
        progress: show a progress bar.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    common = {"seed": seed, "device": device, "progress": progress}
    # Weights that are not coded decide as well.
    key = f"{VERSION} {sorted(weights)} {most_bits} {learned} {rotated} {seed}"
    with stage_folder(folder, key, model.state_dict(), batches) as kept:
        path = None if kept is None else kept / "distortions.safetensors"
        if path is not None and path.exists():
            return {name: values.tolist() for name, values in read_part(path)[1].items()}
        fisher = fisher or fisher_information(
            model, weights, inputs, tokens=SUMMED_TOKENS, **common
        )
        found = estimate_distortions(
            model,
            weights,
            inputs,
            fisher,
            most_bits=most_bits,
            learned=learned,
            rotated=rotated,
            **common,
        )
        if path is not None:
            parts = {name: torch.tensor(v, dtype=torch.float64) for name, v in found.items()}
            save_part(path, parts, {})
    return found


@torch.no_grad()
def unexplained_parts(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    batches: list[Tensor],
    *,
    rotated: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Part of the inputs' energy of each layer that the layer's other inputs do not explain.

    It is the factor by which rounding with error feedback (GPTQ) lowers the error of rounding
    without: with L L^T the Gram matrix, sum of L_ii^2 over the trace.

    Args:
        model: in evaluation mode.
        weights: parameters of the model by name.
        batches: of inputs, on the model's device.
        rotated: of the rotated inputs.
        seed: of sampled positions and inputs of a neuron.

    Returns:
        By name a number in (0, 1]; 1 for a weight that is no plain product.
    """
    sums: dict[str, _Sums] = {}
    size, count = sum(map(len, batches)), 0

    def see(name: str, product: Product) -> None:
        generator = torch.Generator().manual_seed(seed)
        wanted = -(-max(8 * min(product.length(), MOST_COLUMNS), 4096) // size)
        found = product.columns(product.sample(wanted, count, generator), count)
        found = rotate(found.float().mT).mT if rotated else found.float()
        inputs = torch.randperm(found.shape[2], generator=generator)[:MOST_COLUMNS]
        columns = found[:, :, inputs.to(found.device)].permute(1, 2, 0, 3).flatten(2)
        with torch.autocast(found.device.type, enabled=False):
            sums.setdefault(name, _Sums()).add(columns)

    with watching_products(model, weights, see):
        for batch in batches:
            count = len(batch)
            with running(batch, batch.device):
                model(batch)
    return {name: sums[name].unexplained() if name in sums else 1.0 for name in weights}


@dataclass
class _Sums:
    """Sums over positions of a layer's columns (groups, n, positions), n in random order."""

    gram: Tensor | float = 0.0  # (groups, n, n)
    inputs: Tensor | float = 0.0  # (groups, n)
    count: int = 0

    def add(self, columns: Tensor) -> None:
        self.gram += columns @ columns.mT
        self.inputs += columns.sum(-1)
        self.count += columns.shape[-1]

    def unexplained(self) -> float:
        """Part of the energy that the other inputs do not explain."""
        # So few positions would explain any input; the rest counts as unexplained.
        n = max(self.count // 4, 1)
        gram, mean = self.gram[:, :n, :n].double() / self.count, self.inputs[:, :n] / self.count
        energy = gram.diagonal(dim1=-2, dim2=-1)
        gram = gram - mean.double()[:, :, None] * mean.double()[:, None]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = 0.01 * diagonal.mean(-1, keepdim=True) + 1e-12 * energy.mean() + 1e-30
        # The input of least energy last: those before it are rounded first, as by the solver.
        order = diagonal.mean(0).argsort()
        gram = (gram + torch.diag_embed(ridge.expand_as(diagonal)))[:, order][:, :, order]
        factor = torch.linalg.cholesky(gram).diagonal(dim1=-2, dim2=-1)
        return min(float(factor.square().sum() / energy.sum().clamp(min=1e-300)), 1.0)


def _first(inputs: Sequence[Tensor] | Tensor, count: int, size: int) -> list[Tensor]:
    """The first calibration inputs in batches of at most `size`."""
    return split_inputs(inputs, size)[: max(count // size, 1)]


def _clustered(weight: Tensor, importance: Tensor, bits: int, rotated: bool = False) -> Tensor:
    """The weight on the CPU, coded by weighted k-means of its rows relative to their norms."""
    rows, costs = as_matrix(weight.float().cpu()), as_matrix(importance).double()
    if rotated:
        rows, costs = rotate(rows), rotate_squares(costs)
    norms = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    values = (rows / norms).reshape(-1)
    costs = (costs * norms.double().square()).reshape(-1)
    step = -(-values.numel() // (MOST_ROTATED if rotated else MOST_WEIGHTS))
    shares = (costs / costs.mean().clamp(min=1e-300)).float()
    codebook, _ = cluster(
        values[::step].contiguous(),
        k=2**bits,
        method="kmeans",
        importance=shares[::step].contiguous(),
    )
    codes = assign(values, codebook)
    coded = codebook[0][codes.long()].view_as(rows) * norms
    return (unrotate(coded) if rotated else coded).view_as(weight)
