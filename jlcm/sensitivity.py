"""How much errors of each weight change the network's output, and bits shared out accordingly.

The Kullback-Leibler divergence of a network from its original is, to second order, half the squared
error of the weights weighted by the Fisher information, whose diagonal is estimated here on
unlabelled inputs. SqueezeLLM (Kim et al., 2024) weights its k-means by the same quantity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.clustering.scalar import cluster
from jlcm.learning.forward import logits_of, to_device
from jlcm.select import as_matrix

#: Inputs that the estimate uses at most: sums over whole tensors settle long before.
MOST_INPUTS = 256
#: Inputs of a step. Few, because the square of a sum over many inputs varies more.
STEP = 4
#: Weights of a tensor that are clustered to estimate its error.
MOST_WEIGHTS = 2**16
#: Widths of a code that are clustered; each further bit quarters the error.
CLUSTERED_BITS = 5


def fisher_information(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    inputs: Sequence[Tensor] | Tensor,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of each weight, per input.

    Labels are drawn from the network's own output distribution. Their gradients have mean zero, so
    the square of a sum over several inputs is, in the mean, the sum of the squares.

    Args:
        model: returns logits (n, ..., classes), which count for each position.
        weights: parameters of the model by name.
        inputs: unlabelled calibration inputs (n, ...) or batches of them.
        seed: of the labels.
        device: where it runs; the model stays there.
        progress: show a progress bar.

    Returns:
        By name a float32 tensor of the parameter's shape, on the CPU.

    Raises:
        ValueError: no inputs, outputs that are not logits, or gradients that are NaN or infinite.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    steps = [part for batch in batches for part in batch.split(STEP) if len(part)]
    steps = steps[: MOST_INPUTS // STEP]
    if not steps:
        raise ValueError("the calibration set is empty")
    device = torch.device(device)
    model.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    bar = tqdm(steps, desc="sensitivity", unit="step", disable=not progress, leave=False)
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for x in bar:
            with torch.enable_grad():
                logits = logits_of(model(to_device(x, device)), "the network").float()
                shares = logits.detach().softmax(-1).flatten(0, -2).cpu()
                labels = torch.multinomial(shares, 1, generator=generator).to(device)
                likelihood = logits.log_softmax(-1).flatten(0, -2).gather(1, labels).sum()
                gradients = torch.autograd.grad(
                    likelihood, list(weights.values()), allow_unused=True
                )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.double().square()
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
    count = sum(map(len, steps))
    found = {name: (total / count).float().cpu() for name, total in sums.items()}
    if not all(values.isfinite().all() for values in found.values()):
        raise ValueError("gradients on the calibration inputs are NaN or infinite")
    return found


def distortions(weight: Tensor, importance: Tensor, most_bits: int) -> list[float]:
    """Estimated divergence that coding a weight with 1, 2, ... `most_bits` bits causes.

    Rows are clustered relative to their norm, as scales or a norm that follows allow.

    Args:
        weight: any shape, rows first.
        importance: Fisher information, same shape.
        most_bits: widest code.
    """
    rows = as_matrix(weight.detach().float().cpu())
    norms = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    values = (rows / norms).reshape(-1)
    costs = (as_matrix(importance) * norms.square()).reshape(-1).double()
    step = -(-values.numel() // MOST_WEIGHTS)
    values, costs = values[::step], costs[::step] * step
    total = costs.sum().clamp(min=1e-300)
    shares = (costs / total * costs.numel()).float()
    found: list[float] = []
    for bits in range(1, most_bits + 1):
        if bits > CLUSTERED_BITS:
            found.append(found[-1] / 4)
            continue
        codebooks, codes = cluster(values, k=2**bits, method="kmeans", importance=shares)
        error = (values - codebooks[0][codes.long()]).double().square()
        found.append(0.5 * float((costs * error).sum()))
    return found
