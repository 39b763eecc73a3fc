"""Which tensors are compressed, and their view as a matrix of output neurons."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Chooses layers: called with every submodule and its name in the model.
Filter = Callable[[nn.Module, str], bool]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


def linear_and_convolution(module: nn.Module, name: str) -> bool:
    """Choose every Linear, Conv1d, Conv2d and the projections of MultiheadAttention (the default).

    Args:
        module: submodule of the network.
        name: its full name.

    Returns:
        Whether its weight is to be compressed.
    """
    return isinstance(module, _LAYERS)


def with_embeddings(module: nn.Module, name: str) -> bool:
    """Choose the default and every Embedding.

    Args:
        module: submodule of the network.
        name: its full name.

    Returns:
        Whether its weight is to be compressed.
    """
    return isinstance(module, (*_LAYERS, nn.Embedding))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own weight matrices, whose rows are output neurons (or tokens)."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if getattr(module, n) is not None)
    return ("weight",)


def select(model: nn.Module, filter_fn: Filter) -> dict[str, nn.Parameter]:
    """The tensors to compress, by full name, in the order of the model.

    A tensor that several modules share appears once, under its first name.

    Raises:
        ValueError: if the filter chooses no layer, or one without a weight that can be replaced.
    """
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for full_name, parameter in _weights(model, filter_fn):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            chosen[full_name] = parameter
    if not chosen:
        raise ValueError(
            "no layer selected: the filter function accepted none of the model's layers "
            "(by default Linear, Conv1d, Conv2d and MultiheadAttention)"
        )
    return chosen


def _weights(model: nn.Module, filter_fn: Filter) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules():
        if filter_fn(module, name):
            for weight in weight_names(module):
                full_name = f"{name}.{weight}" if name else weight
                parameter = _own_parameter(module, weight, full_name)
                if parameter.numel():
                    yield full_name, parameter


def _own_parameter(module: nn.Module, name: str, full_name: str) -> nn.Parameter:
    parameter = module._parameters.get(name)
    if parameter is not None and not isinstance(module, _BatchNorm):
        return parameter
    kind = type(module).__name__
    if parameter is None and isinstance(getattr(module, name, None), Tensor):
        raise ValueError(
            f"{full_name} of {kind} is computed from other tensors (weight or spectral norm?): "
            "make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    raise ValueError(
        f"the filter function accepted layer {full_name.rpartition('.')[0]!r}, but {kind} has no "
        "weight matrix; combine it with jlcm.linear_and_convolution"
    )


def as_matrix(weight: Tensor) -> Tensor:
    """View a weight as (n_o, n_i): a convolution becomes n_o x (c_in / groups * kernel)."""
    return weight.reshape(weight.shape[0], -1)
