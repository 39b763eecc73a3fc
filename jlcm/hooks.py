"""Look into forwards: end them early, see what modules are given, leave modules out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn


class Stopped(Exception):
    """Ends a forward that needs to go no further."""


@contextmanager
def stopping(module: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """End forwards where a module is called; the list then holds its arguments."""
    found: list[tuple[tuple, dict]] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args, kwargs))
        raise Stopped

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(Stopped):
            yield found
    finally:
        hook.remove()


@contextmanager
def watching(module: nn.Module, see: Callable[[str, tuple], Any]) -> Iterator[None]:
    """Call `see` with the name and the arguments of each submodule that runs."""
    hooks = [
        child.register_forward_pre_hook(lambda _, args, name=name: see(name, args))
        for name, child in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_forwards(modules: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """Let each module call `forward` in place of its own."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
