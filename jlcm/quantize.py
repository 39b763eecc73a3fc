"""The compared methods, each through the same selection, packing and accounting as ours."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.budget import code_bits
from jlcm.compress import (
    Compression,
    check_model,
    check_range,
    eight_bit_ends,
    pack_model,
    reference_bytes,
)
from jlcm.config import FIRST_LAST, Invalid, check_alpha, check_choice
from jlcm.encode import encode_int8, relative_error
from jlcm.fold import fold_batch_norms, norms_after_layers
from jlcm.layers import is_static_norm, linearise
from jlcm.learning.report import OnResult, ignore
from jlcm.methods.adaround import AdaRound, adaround, nearest
from jlcm.methods.awq import AWQ, awq
from jlcm.methods.brecq import Brecq, brecq
from jlcm.methods.dfq import DFQ, dfq
from jlcm.methods.dkm import DKM, dkm, one_codebook
from jlcm.methods.llm_int8 import LLMInt8, llm_int8
from jlcm.methods.lnq import LNQ, kmeans_codebooks, lnq
from jlcm.methods.network import Network
from jlcm.methods.nupes import Nupes, nupes, power_grid
from jlcm.methods.optq import OPTQ, optq
from jlcm.methods.optq import nearest as nearest_in_groups
from jlcm.methods.powerquant import PowerQuant, powerquant
from jlcm.methods.redpp import RedPP, redpp
from jlcm.methods.rex import REx, rex
from jlcm.methods.rtn import RTN, rtn
from jlcm.methods.squant import SQuant, squant
from jlcm.methods.squeezellm import SqueezeLLM, squeezellm
from jlcm.packed import StoredWeight
from jlcm.select import Filter, linear_and_convolution, select


@dataclass(frozen=True)
class Method:
    """How a method runs.

    Attributes:
        options: its dataclass of options.
        encode: stored weights by name, from the network and the options.
        learn: tunes the packed network in place, from it, its full-precision original, the network
            and the options; returns what it did to each part. None for methods that do not learn.
        folds: whether batch norms are folded first.
        observes: whether encoding looks at calibration inputs.
    """

    options: type
    encode: Callable[[Network, Any], dict[str, StoredWeight]]
    learn: Callable[[nn.Module, nn.Module, Network, Any], list] | None = None
    folds: bool = True
    observes: bool = False

    @property
    def needs_inputs(self) -> bool:
        """Whether the method needs calibration inputs."""
        return self.observes or self.learn is not None


METHODS: dict[str, Method] = {
    "rtn": Method(RTN, rtn),
    "dfq": Method(DFQ, dfq),
    "squant": Method(SQuant, squant),
    "powerquant": Method(PowerQuant, powerquant),
    "redpp": Method(RedPP, redpp, folds=False),
    "rex": Method(REx, rex),
    "adaround": Method(AdaRound, nearest, adaround),
    "brecq": Method(Brecq, nearest, brecq),
    "nupes": Method(Nupes, power_grid, nupes),
    "lnq": Method(LNQ, kmeans_codebooks, lnq, folds=False),
    "dkm": Method(DKM, one_codebook, dkm, folds=False),
    "optq": Method(OPTQ, nearest_in_groups, optq),
    "awq": Method(AWQ, awq, observes=True),
    "squeezellm": Method(SqueezeLLM, squeezellm, folds=False, observes=True),
    "llm_int8": Method(LLMInt8, llm_int8),
}


def quantize(
    model: nn.Module,
    method: str,
    *,
    alpha: float = 5.33,
    options: Any = None,
    bits: int | None = None,
    first_last: str = "same",
    filter_fn: Filter = linear_and_convolution,
    calibration: Sequence[Tensor] | Tensor | None = None,
    seed: int = 0,
    inplace: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_result: OnResult = ignore,
) -> nn.Module:
    """Quantise a network's weights by one of the methods that `jlcm.compress` is compared with.

    Args:
        model: any network; it is quantised for inference.
        method: "rtn", "dfq", "squant", "powerquant", "redpp", "rex", "llm_int8" (without data),
            "adaround", "brecq", "nupes", "lnq", "dkm", "optq", "awq" or "squeezellm" (with
            calibration inputs).
        alpha: goal, fp16 bytes of the weights over their packed bytes. Methods of fixed width take
            floor(16 / alpha) bits, so that only their nominal alpha reaches it; scales and zero
            points come on top and are counted.
        options: the method's dataclass of options; None for its defaults.
        bits: width of the codes, 1 to 8, in place of the one that follows from alpha.
        first_last: "same" (the first and the last weight like all others) or "int8" (8 bits, one
            scale for each row).
        filter_fn: called with every submodule and its full name, true where the submodule's weight
            is to be quantised; default every Linear, Conv1d, Conv2d and MultiheadAttention.
        calibration: unlabelled inputs as the network takes them, one tensor (n, ...) or a list of
            such batches, for methods that look at data.
        seed: of every random choice.
        inplace: use up `model` in place of a copy.
        device: where learning runs. After methods that learn the network may stay there.
        progress: show progress bars.
        on_result: called with the result of each layer, block or epoch as soon as there is one.

    Returns:
        The quantised network, in evaluation mode, as `jlcm.compress` returns it.

    Raises:
        Invalid: (a ValueError) for an option out of range, or no calibration inputs for a method
            that needs them.
        ValueError: as `jlcm.compress`.
    """
    alpha = check_alpha(alpha)
    check_choice("method", method, tuple(METHODS))
    check_choice("first_last", first_last, FIRST_LAST)
    chosen = METHODS[method]
    options = chosen.options() if options is None else options
    if not isinstance(options, chosen.options):
        raise Invalid(f"options of method={method} are a {chosen.options.__name__}")
    if bits is not None and not 1 <= bits <= 8:
        raise Invalid(f"bits={bits} must be between 1 and 8")
    if chosen.needs_inputs and calibration is None:
        raise Invalid(f"method={method} needs calibration inputs: pass calibration=")
    check_model(model)
    model = (model if inplace else copy.deepcopy(model)).eval()
    linear = linearise(model)
    select(model, filter_fn)
    network = Network(
        model,
        {},
        {},
        alpha,
        calibration=calibration,
        seed=seed,
        device=torch.device(device),
        progress=progress,
        on_result=on_result,
    )
    summary = Compression(
        alpha=alpha,
        reference_bytes=reference_bytes(model),
        options={"method": method, **asdict(options), "first_last": first_last, "seed": seed},
        notes=network.notes,
        relu=network.relu,
        linear=linear,
    )
    folded = _fold(network) if chosen.folds else set()
    weights = select(model, filter_fn)
    check_range(model, weights)
    ends = eight_bit_ends(weights, first_last)
    network.weights = {name: weight for name, weight in weights.items() if name not in ends}
    network.bits = dict.fromkeys(network.weights, bits or code_bits(alpha))
    reference = copy.deepcopy(model) if chosen.learn is not None else None
    packed: dict[str, StoredWeight] = {}
    for name, stored in chosen.encode(network, options).items():
        weight = weights[name].detach().float().cpu()
        squared = (stored().detach().float().cpu() - weight).double().square().sum()
        stored.relative_error = relative_error(squared, weight)
        packed[name] = stored
    packed |= {name: encode_int8(weights[name]) for name in ends}  # a method may rescale them
    pack_model(model, {id(weights[name]): stored for name, stored in packed.items()}, folded)
    model.compression, model.learning = summary, []
    if chosen.learn is not None:
        model.learning = chosen.learn(model, reference, network, options)
    return model


def _fold(network: Network) -> set[str]:
    """Fold batch norms and remember their statistics; names of the norms."""
    modules = dict(network.model.named_modules())
    try:
        pairs = norms_after_layers(network.model)
    except ValueError as error:
        if any(is_static_norm(module) for module in modules.values()):
            network.notes.append(f"batch norms are not folded: {error}")
        return set()
    for norm, layer in pairs.items():
        module = modules[norm]
        ones = torch.ones_like(module.running_mean)
        mean = 0 * ones if module.bias is None else module.bias.detach().float().clone()
        deviation = ones if module.weight is None else module.weight.detach().float().abs()
        network.norms[layer] = mean, deviation
    return fold_batch_norms(network.model)
