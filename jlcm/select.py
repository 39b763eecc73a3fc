"""Which tensors are compressed, and their view as a matrix of output neurons."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

#: Chooses layers: called with every submodule and its name in the model.
Filter = Callable[[nn.Module, str], bool]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


def linear_and_convolution(module: nn.Module, name: str) -> bool:
    """Every Linear, Conv1d, Conv2d and the projections of MultiheadAttention (the default)."""
    return isinstance(module, _LAYERS)


def with_embeddings(module: nn.Module, name: str) -> bool:
    """The default and every Embedding."""
    return isinstance(module, (*_LAYERS, nn.Embedding))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own weight matrices: rows are output neurons (tokens of an Embedding)."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if getattr(module, n) is not None)
    return ("weight",)


def select(model: nn.Module, filter_fn: Filter) -> dict[str, nn.Parameter]:
    """The tensors to compress, by full name, in the order of the model.

    A tensor that several modules share appears once, under its first name.

    Raises:
        ValueError: if the filter chooses no layer.
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
                yield (f"{name}.{weight}" if name else weight), getattr(module, weight)


def as_matrix(weight: Tensor) -> Tensor:
    """View a weight as (n_o, n_i): a convolution becomes n_o x (c_in / groups * kernel)."""
    return weight.reshape(weight.shape[0], -1)
