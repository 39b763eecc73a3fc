"""LNQ: least-squares codebooks and coordinate descent over the codes, layer by layer.

Kim et al., "GuidedQuant: Large language model quantization via exploiting end loss guidance", ICML
2025. With H the Gram matrix of a layer's inputs, (w - w~)^T H (w - w~) is lowered in turn by the
codebooks, which is linear least squares, and by one code after the other. The paper has a codebook
for each row. At equal bytes small layers cannot pay for that: they have as many as the bytes buy.
"""

from dataclasses import dataclass, replace

from torch import nn
from tqdm import tqdm

from jlcm.budget import Allocation, allocate, code_bits, goal_bytes, least_bytes
from jlcm.config import Encoding, Init, Invalid, check_choice
from jlcm.encode import encode
from jlcm.layers import is_static_norm
from jlcm.learning.options import Learn
from jlcm.learning.sequential import LayerResult, learn_layers
from jlcm.methods.network import Network
from jlcm.packed import StoredWeight
from jlcm.select import as_matrix

LAYOUTS = {"groups": "multi_codebook", "per_row": "per_row"}


@dataclass(frozen=True, kw_only=True)
class LNQ:
    """Options of LNQ.

    Attributes:
        layout: "groups" (flat groups of weights, as many as the bytes buy) or "per_row" (the
            paper's: a codebook for each row, whose bytes come on top).
        rounds: outer rounds.
        sweeps: coordinate-descent sweeps over all codes in a round.
        damping: ridge towards the original weight, relative to the mean diagonal of H.
        positions: pixels or tokens sampled for each input of a neuron, at least 32,768 together.
        memory: bytes of activations kept in memory.
    """

    layout: str = "groups"
    rounds: int = 3
    sweeps: int = 4
    damping: float = 0.01
    positions: int = 32
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        """Check the choice and the ranges."""
        check_choice("layout", self.layout, tuple(LAYOUTS))
        for name in ("rounds", "sweeps"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 1")
        self.learning()

    def learning(self) -> Learn:
        """The same as options of layer-wise learning.

        Raises:
            Invalid: for a value out of range.
        """
        return Learn(
            kind="lnq",
            weighting="even",
            row_scale=False,
            statistics="none",
            damping=(self.damping,),
            correction=0.0,  # the target is what the original weight makes of the inputs
            rounds=self.rounds,
            sweeps=self.sweeps,
            positions=self.positions,
            memory=self.memory,
        )


def kmeans_codebooks(network: Network, options: LNQ) -> dict[str, StoredWeight]:
    """Encode every weight with k-means codebooks, in the order that its rows have.

    Args:
        network: its weights, bits and alpha.
        options: the layout.

    Returns:
        The stored weights by name.

    Raises:
        Invalid: if groups at the bits of alpha cannot reach alpha, not even with one-bit codes.
    """
    _describe(network, options)
    encoding, init = Encoding(kind=LAYOUTS[options.layout]), Init(method="kmeans")
    bar = tqdm(
        _allocations(network, encoding).items(),
        desc="cluster",
        unit="layer",
        disable=not network.progress,
        leave=False,
    )
    return {
        name: encode(network.weights[name], found, encoding, init, try_stored_order=False)
        for name, found in bar
    }


def lnq(
    packed: nn.Module, reference: nn.Module, network: Network, options: LNQ
) -> list[LayerResult]:
    """Learn codes and codebooks of every layer in forward order, in place.

    Args:
        packed: network with k-means codebooks.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result for each weight; its errors are those of the outputs on held-out inputs.

    Raises:
        ValueError: as `jlcm.learning.sequential.learn_layers`.
    """
    return learn_layers(
        packed,
        reference,
        network.calibration,
        options=options.learning(),
        seed=network.seed,
        device=network.device,
        progress=network.progress,
        on_result=network.on_result,
    )


def _allocations(network: Network, encoding: Encoding) -> dict[str, Allocation]:
    """Bits and bytes of every weight."""
    shapes = {name: tuple(as_matrix(w).shape) for name, w in network.weights.items()}
    wanted = code_bits(network.alpha)
    if encoding.kind == "multi_codebook" and set(network.bits.values()) == {wanted}:
        found = allocate(shapes, network.alpha, encoding)
        network.notes += [
            f"{name}: {plan.bits}-bit codes, so that the goal is reached"
            for name, plan in found.items()
            if plan.bits != wanted
        ]
        return found
    plans = {
        name: Allocation(rows=rows, columns=columns, bits=network.bits[name])
        for name, (rows, columns) in shapes.items()
    }
    least = {name: least_bytes(encoding.kind, plan, encoding.tile) for name, plan in plans.items()}
    count = sum(plan.count for plan in plans.values())
    spare = goal_bytes(count, network.alpha) - sum(least.values())
    if spare < 0:
        owner = "row" if encoding.kind == "per_row" else "weight"
        network.notes.append(
            f"codes of these bits and one codebook for each {owner} take more bytes than "
            f"alpha={network.alpha:g} leaves"
        )
    return {
        name: replace(plan, nbytes=least[name] + max(spare, 0) * plan.count // count)
        for name, plan in plans.items()
    }


def _describe(network: Network, options: LNQ) -> None:
    """Note what the paper has otherwise."""
    network.notes += [
        "of GuidedQuant LNQ alone, without the guidance by the gradient of the loss",
        "codebooks start from plain k-means, and codes from rounding to them with error feedback",
        "inputs of a layer come from the network as quantised so far",
        "a layer that is no better on the held-out inputs keeps its k-means start",
    ]
    if options.layout == "groups":
        network.notes.append(
            "flat groups of weights share a codebook, as many as the bytes buy, in place of rows"
        )
        if any(is_static_norm(module) for module in network.model.modules()):
            network.notes.append(
                "rows of a group count by the squared scale of the batch norm that follows"
            )
