"""What learning tells its caller while it runs."""

from collections.abc import Callable
from typing import Any

#: Called with the result of each layer, block or epoch as soon as it is finished.
OnResult = Callable[[Any], None]


def ignore(result: Any) -> None:
    """Tell nobody."""


def collector(on_result: OnResult) -> tuple[list, OnResult]:
    """An empty list of results, and what adds a finished one to it and then tells of it."""
    results: list = []

    def finish(result: Any) -> None:
        results.append(result)
        on_result(result)

    return results, finish
