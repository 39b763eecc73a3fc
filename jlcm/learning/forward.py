"""Run networks on calibration inputs: augmentation, precision, outputs and their divergence."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

PRECISIONS = ("auto", "bf16", "fp32")
#: Inputs at a time where no gradients are needed.
EVALUATION_BATCH = 64
#: Tokens of sequences that run at once: each has logits for the whole vocabulary.
MOST_TOKENS = 2048
#: Logits whose divergences are computed at once, so that what is between stays in the cache.
_MOST_LOGITS = 2**21
#: For more classes than this random signs take the place of drawn labels.
_MANY_CLASSES = 2**14


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    flip: bool = False,
    crop: int | None = None,
    zoom: float = 1.0,
    mix: bool = False,
) -> Tensor:
    """Vary images at random; other tensors come back as they are.

    Args:
        x: (n, channels, height, width), floating.
        generator: of the random choices.
        flip: mirror each with probability one half.
        crop: side in pixels of windows that are cut out, None for whole images.
        zoom: smallest area, as share of the image, of windows that are cut out and resized to the
            image's size; 1 for none.
        mix: blend each with another image of the batch, in a random proportion.

    Returns:
        (n, channels, crop, crop), or x's shape.
    """
    if x.dim() != 4 or not x.is_floating_point():
        return x
    if flip:
        chosen = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(chosen[:, None, None, None], x.flip(-1), x)
    if crop is not None:
        x = torch.stack([_window(image, (crop, crop), generator) for image in x])
    if zoom < 1:
        area = zoom + (1 - zoom) * torch.rand(len(x), generator=generator)
        stretch = (torch.rand(len(x), generator=generator) - 0.5) * math.log(16 / 9)
        sides = (area[:, None] * torch.stack([stretch, -stretch], 1).exp()).sqrt().clamp(max=1)
        sizes = (sides * torch.tensor(x.shape[-2:])).round().clamp(min=1).int().tolist()
        windows = [_window(i, size, generator) for i, size in zip(x, sizes, strict=True)]
        resized = [
            F.interpolate(w[None], x.shape[-2:], mode="bilinear", antialias=True) for w in windows
        ]
        x = torch.cat(resized)
    if mix:
        part = torch.rand(len(x), 1, 1, 1, generator=generator)
        x = torch.lerp(x, x[torch.randperm(len(x), generator=generator)], part)
    return x


def _window(image: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random window (channels, *size) of an image."""
    places = [
        int(torch.randint(0, whole - part + 1, (1,), generator=generator))
        for whole, part in zip(image.shape[-2:], size, strict=True)
    ]
    (top, left), (height, width) = places, size
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class OutputDistribution:
    """The distribution of labels that a network's outputs are parameters of.

    Attributes:
        divergences: (rows,) float32 KL(target || output) of parameters (rows, size). No gradients
            reach the target, nor is there a second derivative.
        drawn: random scalar whose gradient has mean zero and the Fisher information as second
            moment: the log-likelihood of one label a row, drawn from the distribution itself, or a
            product with random signs.
    """

    divergences: Callable[[Tensor, Tensor], Tensor]
    drawn: Callable[[Tensor, torch.Generator], Tensor]


class _DivergencesOfLogits(torch.autograd.Function):
    """Divergences a few rows at a time, with their gradient: nothing of all rows is in float32."""

    @staticmethod
    def forward(ctx, output, target):  # noqa: D102
        result = torch.empty(len(output), device=output.device)
        slope = torch.empty_like(output) if ctx.needs_input_grad[0] else None
        rows = max(_MOST_LOGITS // output.shape[1], 1)
        for part in (slice(start, start + rows) for start in range(0, len(output), rows)):
            found, wanted = (x[part].float().log_softmax(-1) for x in (output, target))
            shares = wanted.exp()
            result[part] = wanted.sub_(found).mul_(shares).sum(-1)
            if slope is not None:
                slope[part] = found.exp_().sub_(shares)
        ctx.save_for_backward(slope)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # noqa: D102
        (slope,) = ctx.saved_tensors
        return slope * gradient.to(slope.dtype)[:, None], None


def _drawn_class(logits: Tensor, generator: torch.Generator) -> Tensor:
    shares = logits.detach().softmax(-1)
    if shares.shape[1] > _MANY_CLASSES:
        # A label's gradient is large where it is an unlikely one: few of them decide the estimate.
        # Signs z have the same second moment: that of sqrt(p) z - p (sqrt(p) . z) is
        # diag(p) - p p^T, too.
        signs = torch.randint(0, 2, shares.shape, dtype=torch.int8, generator=generator)
        parts = shares.sqrt().mul_(signs.to(logits.device).mul_(2).sub_(1))
        return (logits * (parts - shares * parts.sum(-1, keepdim=True))).sum()
    labels = torch.multinomial(shares.cpu(), 1, generator=generator).to(logits.device)
    return logits.log_softmax(-1).gather(1, labels).sum()


def _divergences_of_means(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().sum(-1) / 2


def _drawn_values(means: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(means.shape, generator=generator).to(means.device)
    return -(means.detach() + noise - means).square().sum() / 2


#: Outputs are logits of classes.
CATEGORICAL = OutputDistribution(_DivergencesOfLogits.apply, _drawn_class)
#: Outputs are means of independent normal distributions of variance 1.
GAUSSIAN = OutputDistribution(_divergences_of_means, _drawn_values)


def distribution_of(model: nn.Module) -> OutputDistribution:
    """Gaussian where the network's attribute `output_distribution` says so, else categorical."""
    gaussian = getattr(model, "output_distribution", "categorical") == "gaussian"
    return GAUSSIAN if gaussian else CATEGORICAL


def divergence(
    output: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    distribution: OutputDistribution = CATEGORICAL,
) -> Tensor:
    """Mean KL(target || output) over rows of the last dimension, times the squared temperature.

    A Gaussian's does not depend on the temperature.
    """
    if temperature != 1:
        output, target = output.float() / temperature, target.float() / temperature
    return divergences(output, target, distribution).mean() * temperature**2


def divergences(
    output: Tensor, target: Tensor, distribution: OutputDistribution = CATEGORICAL
) -> Tensor:
    """(rows,) float32 KL(target || output) of each row of the last dimension."""
    return distribution.divergences(output.flatten(0, -2), target.flatten(0, -2))


def logits_of(output: object, network: str) -> Tensor:
    """Parameters of the output distribution that a network returned: logits (n, ..., classes).

    Raises:
        ValueError: it is neither such a tensor nor has one as `logits`; `network` names it.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(
            f"{network} must return logits (n, ..., classes), not {type(output).__name__}"
        )
    return logits


def outputs_of(model: nn.Module, inputs: Tensor, device: torch.device, network: str) -> Tensor:
    """Outputs (`logits_of`) for all inputs on `device`, without gradients.

    Raises:
        ValueError: NaN or Inf among them.
    """
    return torch.cat(list(output_parts(model, inputs, device, network)))


def output_parts(
    model: nn.Module, inputs: Tensor, device: torch.device, network: str
) -> Iterator[Tensor]:
    """`outputs_of` as many inputs at a time as run at once.

    Raises:
        ValueError: as `outputs_of`.
    """
    most = getattr(model, "evaluation_batch", EVALUATION_BATCH)
    for part in split_sequences(inputs, min(most, EVALUATION_BATCH)):
        with torch.no_grad():
            output = logits_of(model(to_device(part, device)), network)
        if not output.isfinite().all():
            raise ValueError(f"outputs of {network} on the calibration inputs contain NaN or Inf")
        yield output


def split_sequences(inputs: Tensor, size: int) -> Sequence[Tensor]:
    """Inputs in parts of at most `size`; sequences of token ids in parts of few tokens."""
    if not inputs.is_floating_point():
        size = min(size, max(MOST_TOKENS // max(inputs[0].numel(), 1), 1))
    return inputs.split(size)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move; images in the layout that convolutions are fastest in."""
    x = x.to(device)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16, which are faster than those for float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Training in bf16 (autocast), fp32, or auto: bf16 where the device computes in it."""
    if name == "auto":
        name = "bf16" if computes_bf16(device) else "fp32"
    with ExitStack() as stack:
        if name == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(DepthwiseGradients())
        yield


def running(x: Tensor, device: torch.device) -> AbstractContextManager:
    """Precision of forwards: sequences of tokens are long, and their sums forgive some rounding."""
    return precision("fp32" if x.is_floating_point() else "auto", device)


class DepthwiseGradients(TorchFunctionMode):
    """Compute gradients of depthwise bf16 convolutions in float32 while this is active.

    oneDNN's bf16 gradients of strided and of 5 x 5 depthwise convolutions take 2 to 5 times as long
    as those in float32, and they are most of the time of an EfficientNet's backward pass.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        if func is F.conv2d and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            call = _conv2d_arguments(*args, **(kwargs or {}))
            if call is not None:
                return _Depthwise.apply(*call)
        return func(*args, **(kwargs or {}))


class _Depthwise(torch.autograd.Function):
    """A bf16 depthwise convolution with float32 gradients."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, dilation, groups):  # noqa: D102
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = [*ctx.needs_input_grad[:2], False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient.float(),
            x.float(),
            weight.float(),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        of_x = None if of_x is None else of_x.bfloat16()
        return of_x, of_weight, None, None, None, None


def _conv2d_arguments(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> tuple | None:
    """Arguments of `_Depthwise`, None where the convolution is not a plain depthwise one."""
    plain = bias is None and not isinstance(padding, str) and input.dim() == 4
    if not plain or groups == 1 or groups != input.shape[1]:
        return None
    pairs = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return input, weight, *pairs, groups
