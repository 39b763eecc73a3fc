"""Gradient learning of codebooks and mappings (Eq. 5 to 9).

Each weight has one logit per codeword; the mapping is their argmax (hard forward) or softmax (soft
forward). The chain rule favours far codewords (Eq. 7); Eq. 8 and 9 replace its factor by a
decreasing function of the distance between codewords.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jlcm.learning.factors import Factors
from jlcm.learning.objective import Deviation, Quadratic
from jlcm.learning.options import Learn
from jlcm.learning.solver import (
    coordinate_descent,
    least_squares_codebooks,
    least_squares_scales,
)

#: Codebooks beyond this size (8-bit ends) are left to the solver, for their logits would not fit;
#: so are codes with memory.
MOST_CODEWORDS = 32
#: Logits that go through a step together on a CPU: half a MiB, so that they stay in its cache.
CACHED_LOGITS = 2**17
#: Steps from one look at the hard loss to the next, where the step's own loss is another.
HARD_LOSS_EVERY = 10
#: Steps from one look at the held-out inputs to the next.
HELD_LOSS_EVERY = 20


@dataclass(frozen=True)
class Samples:
    """A sampled objective with an activation: ||act(scale * (W~ x) + shift) - targets||^2.

    Attributes:
        inputs: (groups, n, columns).
        targets: (groups, rows, columns), after the activation.
        scale: (groups, rows).
        shift: (groups, rows).
        activation: elementwise.
    """

    inputs: Tensor
    targets: Tensor
    scale: Tensor
    shift: Tensor
    activation: Callable[[Tensor], Tensor]


def codebook_gap(codebooks: Tensor) -> Tensor:
    """(books, 1) mean distance of neighbouring codewords, 1 where all are equal."""
    spread = codebooks.amax(1, keepdim=True) - codebooks.amin(1, keepdim=True)
    gap = spread / max(codebooks.shape[1] - 1, 1)
    return torch.where(gap > 0, gap, 1.0)


def proximal_direction(
    codebooks: Tensor, chosen: Tensor, *, sign: str = "corrected", distance: str = "relative"
) -> Tensor:
    """D of Eq. 8: what a logit's gradient is multiplied by in place of the chain rule's factor.

    D_a = 0 for the chosen codeword a, which is what the "- identity" of Eq. 8 achieves.

    Args:
        codebooks: (N, k) codewords that serve each weight.
        chosen: (N,) index a.
        sign: "corrected", sign(C_j - C_a), so that descent on the logits moves towards the codeword
            that descent on the weight wants; "printed", the opposite.
        distance: unit of |C_j - C_a|: "relative" to the mean gap, "raw", or "rank".

    Returns:
        (N, k).
    """
    difference = codebooks - codebooks.gather(1, chosen[:, None])
    if distance == "rank":
        place = codebooks.argsort(1).argsort(1)
        length = (place - place.gather(1, chosen[:, None])).abs().to(difference)
    elif distance == "relative":
        length = difference.abs() / codebook_gap(codebooks)
    else:
        length = difference.abs()
    direction = difference.sign() / (1 + length)
    return direction if sign == "corrected" else -direction


class AssignCodewords(torch.autograd.Function):
    """Codewords by logits, with the gradients of Eq. 9 or Eq. 7.

    Forward takes logits (N, k), codebooks (books, k), the codebook of each weight (N,) int64 or
    None for one, and `Learn`'s kind, forward, sign and distance; it returns (N,) values and (N,)
    int64 codes of the largest logits. It is fastest where the logits of one codeword lie next to
    each other in memory.
    """

    @staticmethod
    def forward(ctx, logits, codebooks, book, kind, forward, sign, distance):
        """Take the codeword of the largest logit (hard) or the mixture (soft)."""
        chosen = chosen_codes(logits)
        ctx.mark_non_differentiable(chosen)
        entry = chosen if book is None else book * codebooks.shape[1] + chosen
        ctx.save_for_backward(logits, codebooks, book, entry)
        ctx.settings = kind, forward, sign, distance
        if forward == "hard":
            return codebooks.reshape(-1)[entry], chosen
        return (_shares(logits) * _table(codebooks, book)).sum(0), chosen

    @staticmethod
    def backward(ctx, gradient, _):
        """Send a weight's gradient to its codewords and its logits."""
        logits, codebooks, book, entry = ctx.saved_tensors
        kind, forward, sign, distance = ctx.settings
        k = codebooks.shape[1]
        to_logits = to_codebooks = None
        soft = _shares(logits) if forward == "soft" or kind == "joint" else None
        if ctx.needs_input_grad[1]:
            summed = torch.zeros(codebooks.numel(), dtype=torch.float64, device=codebooks.device)
            if forward == "hard":
                summed.index_add_(0, entry, gradient.double())
            elif book is None:
                summed += (soft @ gradient).double()
            else:
                for j in range(k):
                    summed.index_add_(0, book * k + j, (gradient * soft[j]).double())
            to_codebooks = summed.to(codebooks.dtype).view_as(codebooks)
        if ctx.needs_input_grad[0]:
            if kind == "joint":
                table = _table(codebooks, book)
                factor = soft * (table - (soft * table).sum(0))
            else:
                # D depends on the codebook and the chosen codeword only: computed once for each.
                rows, every = codebooks.repeat_interleave(k, 0), torch.arange(k).to(entry)
                directions = proximal_direction(
                    rows, every.repeat(len(codebooks)), sign=sign, distance=distance
                )
                factor = directions.T.contiguous().index_select(1, entry)
            to_logits = (factor * gradient).T
        return to_logits, to_codebooks, None, None, None, None, None


def chosen_codes(logits: Tensor) -> Tensor:
    """(N,) int64 first index of the largest logit; `argmax` is slow over so few."""
    best, k = logits.amax(1), logits.shape[1]
    # The number of codewords before the first that reaches the largest logit.
    before = torch.ones(len(logits), dtype=torch.bool, device=logits.device).view(torch.uint8)
    codes = torch.zeros_like(before)
    for j in range(k - 1):
        before &= (logits[:, j] < best).view(torch.uint8)
        codes += before
    return codes.long()


def _shares(logits: Tensor) -> Tensor:
    """(k, N) softmax over the codewords; along the first dimension it is several times faster."""
    return logits.T.softmax(0)


def _table(codebooks: Tensor, book: Tensor | None) -> Tensor:
    """(k, N) codewords that serve each weight, or (k, 1) if they serve all."""
    return codebooks.T if book is None else codebooks.T.contiguous().index_select(1, book)


def sharpness(logits: Tensor, beta: float) -> Tensor:
    """L2 of Eq. 6: mean over weights of sum_j 1 - |2 softmax(I)_j - 1|^beta."""
    return _Sharpness.apply(logits, beta)


class _Sharpness(torch.autograd.Function):
    """Eq. 6's L2 with its gradient in closed form: one power in place of three passes."""

    @staticmethod
    def forward(ctx, logits, beta):
        """Mean over weights."""
        shares = _shares(logits)
        centred = 2 * shares - 1
        power = centred.abs().pow_(beta - 1)
        ctx.save_for_backward(shares, centred, power)
        ctx.beta = beta
        return logits.shape[1] - (power * centred.abs()).sum(0).mean()

    @staticmethod
    def backward(ctx, gradient):
        """Through |2 p - 1|^beta and the softmax."""
        shares, centred, power = ctx.saved_tensors
        slope = power.mul_(centred.sign_()).mul_(-2 * ctx.beta * gradient / shares.shape[1])
        return shares.mul_(slope - (slope * shares).sum(0)).T, None


def initial_logits(values: Tensor, codebooks: Tensor, book: Tensor | None, codes: Tensor) -> Tensor:
    """-kappa (w - C_j)^2 / gap^2, whose argmax is the given code.

    kappa gives a weight that lies on its codeword a probability of 0.95 between two neighbours one
    gap away; weights near a boundary stay easy to move.

    Args:
        values: (N,) weights divided by their scales.
        codebooks: (books, k).
        book: (N,) int64 or None.
        codes: (N,). Where another codeword is nearer, the code's own codeword replaces the weight.

    Returns:
        (N, k), the logits of one codeword next to each other in memory.
    """
    kappa = math.log(2 * 0.95 / 0.05)
    table, gaps = _table(codebooks, book), codebook_gap(codebooks)[:, 0]
    gap = gaps if book is None else gaps[book]
    own = table.expand(-1, len(codes)).gather(0, codes[None])[0]
    # Equal codewords share the distance: argmax takes the first, so the given one gets a margin.
    nearest = (values - table).abs().argmin(0)
    values = torch.where(nearest == codes, values, own)
    logits = -kappa * ((values - table) / gap).square()
    return logits.scatter_add_(0, codes[None], logits.new_full((1, len(codes)), 1e-4)).T


class Adam:
    """Adam whose second moment may be shared over the last dimension.

    Plain Adam divides by each element's own magnitude, which cancels any constant factor per
    logit, and with it the proximal factor of Eq. 8.
    """

    def __init__(self, parameter: Tensor, lr: Tensor | float, *, shared: bool) -> None:
        """Optimise one tensor with step size `lr` (a number, or a tensor that broadcasts)."""
        self.parameter, self.lr, self.shared, self.step_count = parameter, lr, shared, 0
        self.first = torch.zeros_like(parameter)
        self.second = torch.zeros_like(parameter[..., :1] if shared else parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update from the parameter's gradient, which is then cleared."""
        gradient = self.parameter.grad
        self.step_count += 1
        square = gradient.square()
        if self.shared:
            square = square.mean(-1, keepdim=True)
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(square, 0.001)
        first = 1 - 0.9**self.step_count
        second = 1 - 0.999**self.step_count
        size = (self.second / second).sqrt_().add_(1e-12 * float(self.second.max()) ** 0.5 + 1e-30)
        self.parameter -= self.lr * (self.first / first) / size
        self.parameter.grad = None


def learn_by_gradient(
    problem: Quadratic,
    factors: Factors,
    original: Tensor,
    *,
    held: Quadratic,
    damped: Quadratic,
    samples: Samples | None,
    options: Learn,
    seed: int,
) -> tuple[Factors, list[float]]:
    """Minimise Eq. 6 from given factors.

    Args:
        problem: Gram objective on the training inputs.
        factors: to start from.
        original: (groups, rows, n) weight that L1 pulls to.
        held: Gram objective on the held-out inputs, for stopping early.
        damped: objective of the final least squares and polish.
        samples: objective with the activation, in place of `problem`; None for the latter.
        options: of the learning.
        seed: of the sampled batches.

    Returns:
        The factors, rounded to float16 codebooks and scales, and the training loss of each step.
    """
    k = factors.codebooks.shape[1]
    if k > MOST_CODEWORDS or factors.memory:
        return factors, []
    multiplier = factors.multiplier().expand(original.shape).reshape(-1)
    codebooks = factors.codebooks.clone().requires_grad_()
    codebook_adam = Adam(
        codebooks, options.lr_codebook * codebook_gap(factors.codebooks), shared=False
    )
    pieces = _pieces(factors, original, multiplier, options)
    near = Deviation(problem, original)
    generator = torch.Generator().manual_seed(seed)
    weight_energy = original.square().sum().clamp(min=1e-30)
    settings = options.kind, options.forward, options.sign, options.distance
    sharpens = options.kind != "codebook" and options.lambda_ > 0
    warmup = int(options.warmup * options.iterations)
    best, least, curve = factors, float("inf"), []
    held_least, held_step = float("inf"), 0
    state = factors
    for step in range(options.iterations):
        with torch.enable_grad():
            assigned = [
                AssignCodewords.apply(piece.logits, codebooks, piece.book, *settings)
                for piece in pieces
            ]
        mapped = torch.cat([values.detach() for values, _ in assigned])
        weight = (mapped * multiplier).view(original.shape)
        codes = torch.cat([codes for _, codes in assigned]).view(original.shape)
        state = replace(factors, codes=codes, codebooks=codebooks.detach().clone())
        if samples is None:
            loss, slope = near.loss_and_gradient(weight)
        else:
            loss, slope = _sampled(samples, weight, options.batch_size, generator)
        hard = loss
        if options.forward == "soft" or samples is not None:
            looked = step % HARD_LOSS_EVERY == 0
            hard = near.loss_and_gradient(state.weight())[0] if looked else float("inf")
        if hard < least:
            best, least = state, hard
        curve.append(loss)
        if step % HELD_LOSS_EVERY == HELD_LOSS_EVERY - 1:
            outside = float(held.loss(state.weight()))
            if outside < held_least:
                held_least, held_step = outside, step
            elif step - held_step >= options.patience:
                break
        slope += 2 * options.fidelity / weight_energy * (weight - original)
        slope = slope.reshape(-1) * multiplier
        late = sharpens and step >= warmup
        progress = (step - warmup) / max(options.iterations - warmup, 1)
        beta = options.beta[0] + (options.beta[1] - options.beta[0]) * progress
        for piece, (values, _) in zip(pieces, assigned, strict=True):
            outputs, gradients = [values], [slope[piece.place]]
            with torch.enable_grad():
                if late:
                    part = len(piece.logits) / len(mapped)
                    outputs.append(options.lambda_ * part * sharpness(piece.logits, beta))
                    gradients.append(None)
                torch.autograd.backward(outputs, gradients)
            if piece.adam is not None:
                piece.adam.step()
        codebook_adam.step()
    result = best if options.keep_best else state
    if options.final_least_squares:
        result = least_squares_scales(damped, least_squares_codebooks(damped, result))
    result = result.rounded()
    if options.polish:
        result = coordinate_descent(damped, result, options.polish)
        if options.final_least_squares:
            result = least_squares_codebooks(damped, result).rounded()
    return result, curve


@dataclass(frozen=True)
class _Piece:
    """A run of weights with their logits, few enough for a step to stay in the cache.

    Attributes:
        place: of the weights among all.
        logits: (weights, k), those of one codeword next to each other in memory.
        book: (weights,) int64 or None.
        adam: of the logits, None where the codes are fixed.
    """

    place: slice
    logits: Tensor
    book: Tensor | None
    adam: Adam | None


def _pieces(factors: Factors, original: Tensor, multiplier: Tensor, options: Learn) -> list[_Piece]:
    values = original.reshape(-1) / torch.where(multiplier != 0, multiplier, 1.0)
    codes = factors.codes.reshape(-1)
    size = len(values) if values.is_cuda else max(CACHED_LOGITS // factors.codebooks.shape[1], 1)
    pieces = []
    for start in range(0, len(values), size):
        place = slice(start, min(start + size, len(values)))
        book = None if factors.book is None else factors.book.reshape(-1)[place]
        logits = initial_logits(values[place], factors.codebooks, book, codes[place])
        adam = None
        if options.kind != "codebook":
            shared = options.second_moment == "shared"
            adam = Adam(logits.requires_grad_(), options.lr, shared=shared)
        pieces.append(_Piece(place, logits, book, adam))
    return pieces


def _sampled(
    samples: Samples, weight: Tensor, size: int, generator: torch.Generator
) -> tuple[float, Tensor]:
    """Normalised loss of a random batch of columns, and its gradient in the weight."""
    total = samples.inputs.shape[-1]
    chosen = torch.randint(total, (min(size, total),), generator=generator)
    chosen = chosen.to(weight.device)
    inputs, targets = samples.inputs[..., chosen], samples.targets[..., chosen]
    leaf = weight.clone().requires_grad_()
    with torch.enable_grad():
        before = samples.scale[..., None] * (leaf @ inputs) + samples.shift[..., None]
        squared = (samples.activation(before) - targets).square().sum()
        loss = squared / targets.square().sum().clamp(min=1e-30)
        loss.backward()
    return float(loss.detach()), leaf.grad
