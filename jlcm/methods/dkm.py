"""DKM: weights that are trained through a differentiable k-means.

Cho et al., "DKM: Differentiable k-means clustering layer for neural network compression", ICLR
2022. Each layer has one codebook. In training a weight is a mixture of all codewords in the
proportions of an attention, softmax(-|w - c| / tau), and codewords are means of the weights in the
same proportions, so that gradients reach the weights both ways.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jlcm.budget import Allocation, codebook_bytes
from jlcm.clustering.scalar import FP16_MAX, assign
from jlcm.config import Encoding, Init, Invalid
from jlcm.encode import encode
from jlcm.learning.distill import Distill, DistillResult, distill
from jlcm.methods.network import Network, per_weight
from jlcm.methods.soft_kmeans import SoftCluster, soft_kmeans
from jlcm.packed import PackedWeight, StoredWeight
from jlcm.packing import pack, packed_bytes

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class DKM:
    """Options of DKM.

    Attributes:
        epochs: passes over the training part of the calibration inputs.
        batch_size: inputs of a step.
        lr: peak learning rate of the weights, relative to the root mean square of each tensor.
        lr_vectors: of biases and norms.
        temperature: tau in the first and in the last step, in mean gaps of the k-means codebook;
            geometric in between.
        iterations: of the soft k-means at most, in each step.
        flip: mirror images at random, left to right.
        zoom: smallest area, as share of the image, of random windows that are resized to the
            image's size; 1 for none.
        precision: of training: "bf16" (autocast), "fp32", or "auto" (bf16 where the processor
            has it).
    """

    epochs: int = 8
    batch_size: int = 32
    lr: float = 2e-3
    lr_vectors: float = 4e-4
    temperature: tuple[float, float] = (0.1, 0.003)
    iterations: int = 5
    flip: bool = True
    zoom: float = 0.5
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1:
            raise Invalid(f"iterations={self.iterations} must be at least 1")
        if len(self.temperature) != 2 or not all(0 < t < float("inf") for t in self.temperature):
            raise Invalid(f"temperature={self.temperature} must be two positive numbers")
        self.training()

    def training(self) -> Distill:
        """The same as options of end-to-end training.

        Raises:
            Invalid: for a value out of range.
        """
        return Distill(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            lr_vectors=self.lr_vectors,
            lr_codes=self.lr,
            codes_start=0.0,
            flip=self.flip,
            zoom=self.zoom,
            precision=self.precision,
        )


class DkmWeight(nn.Module):
    """Stands in for a `PackedWeight` with one codebook while it is trained.

    Attributes:
        weights: (N,) float32 parameter, the original weights at first.
        codebook: (K,) float64, ascending, from the last forward; the next one goes on from it.
        unit: mean gap of the codebook at first.
        temperature: tau in this unit.
    """

    def __init__(self, packed: PackedWeight, original: Tensor | None, options: DKM) -> None:
        """Start at the original weights, at the decoded ones if those are unknown."""
        super().__init__()
        self.shape, self.dtype, self.bits = packed.shape, packed.dtype, packed.bits
        self.iterations, self.temperature = options.iterations, options.temperature[0]
        known = original is not None and original.shape == packed.shape
        values = original if known else packed()
        self.weights = nn.Parameter(values.detach().float().reshape(-1).clone())
        self.register_buffer("codebook", packed.codebooks[0].double())
        span = float(self.codebook[-1] - self.codebook[0])
        self.unit = max(span / max(len(self.codebook) - 1, 1), _TINY)

    def forward(self) -> Tensor:
        """The weights as mixtures of codewords: `shape` tensor of `dtype`."""
        tau = self.temperature * self.unit
        codebook = soft_kmeans(self.weights.detach(), self.codebook, tau, self.iterations - 1)
        values, means = SoftCluster.apply(self.weights, codebook, tau)
        self.codebook = means.sort().values
        return values.view(self.shape).to(self.dtype)

    def project(self) -> None:
        """Nothing restricts the weights."""

    def units(self):
        """The parameter with its kind and the unit that its learning rate is relative to."""
        yield "codes", self.weights, float(self.weights.detach().square().mean().sqrt())

    @torch.no_grad()
    def write(self, packed: PackedWeight) -> None:
        """Store the codewords and, of each weight, the nearest; shapes and bytes stay."""
        tau = self.temperature * self.unit
        codebook = soft_kmeans(self.weights, self.codebook, tau, self.iterations)
        packed.relative_error = float("nan")  # what was measured at the clustering
        packed.codebooks = codebook[None].clamp(-FP16_MAX, FP16_MAX).half()
        packed.codes = pack(assign(self.weights, packed.codebooks.float()), self.bits)


def one_codebook(network: Network, options: DKM) -> dict[str, StoredWeight]:
    """Encode every weight with one k-means codebook of 2^bits codewords."""
    network.notes += [
        "trained on unlabelled calibration inputs to the original's outputs, for fewer epochs than "
        "the paper, which fine-tunes with labels",
        "gradients pass through the last iteration of the soft k-means alone",
        "the temperature falls in the course of the training",
        "codebooks start from exact k-means in place of k-means++",
        "batch norms are trained as the scale and shift that they apply at inference",
    ]

    def encode_(weight: Tensor, bits: int) -> PackedWeight:
        count, rows = weight.numel(), weight.shape[0]
        nbytes = packed_bytes(count, bits) + codebook_bytes(bits)
        allocation = Allocation(rows=rows, columns=count // rows, bits=bits, nbytes=nbytes)
        kind = Encoding(kind="multi_codebook")
        return encode(weight, allocation, kind, Init(method="kmeans"), try_stored_order=False)

    return per_weight(network, encode_, "cluster")


def dkm(
    packed: nn.Module, reference: nn.Module, network: Network, options: DKM
) -> list[DistillResult]:
    """Train the weights through soft k-means, end to end, in place.

    Biases and norms are trained with them. After each epoch every weight takes its nearest
    codeword, and of these networks the best on held-out inputs is kept, the k-means start among
    them. Weights in 8 bits with row scales (`first_last="int8"`) are left as they are.

    Args:
        packed: network with one codebook for each weight.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result: the divergence from the original on the held-out inputs before and after.

    Raises:
        ValueError: as `jlcm.learning.distill.distill`.
    """
    members: list[DkmWeight] = []

    def stand_in(stored: PackedWeight, original: Tensor | None) -> DkmWeight | None:
        if stored.scales is not None:
            return None
        members.append(DkmWeight(stored, original, options))
        return members[-1]

    def before_step(done: float) -> None:
        first, last = options.temperature
        for member in members:
            member.temperature = first * (last / first) ** done

    result = distill(
        packed,
        reference,
        network.calibration,
        options=options.training(),
        seed=network.seed,
        device=network.device,
        progress=network.progress,
        stand_in=stand_in,
        before_step=before_step,
        on_result=network.on_result,
    )
    return [result]
