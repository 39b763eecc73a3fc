"""What learning tells its caller while it runs."""

import math
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


def in_brief(result: Any) -> str:
    """Name of a layer or block, and its error before and after, for a progress bar."""
    if math.isnan(result.before):
        return f"{result.name} left as it was"
    return f"{result.name} {result.before:.4f} -> {result.after:.4f}"
