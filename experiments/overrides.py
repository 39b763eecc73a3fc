"""Check the names of command-line overrides, and say which ones exist."""

import difflib
import re
from dataclasses import fields, is_dataclass

from experiments.config import DATA_SCHEMAS, Config

_OVERRIDE = re.compile(r"^(?P<prefix>[+~]{0,2})(?P<key>[A-Za-z_][\w./@:-]*)(?:=.*)?$", re.DOTALL)


def valid_keys() -> dict[str, set[str]]:
    """Top-level options, and the options below each group (of any of its choices)."""
    keys: dict[str, set[str]] = {}
    for field in fields(Config):
        kinds = tuple(DATA_SCHEMAS.values()) if field.name == "data" else (field.type,)
        keys[field.name] = {f.name for k in kinds if is_dataclass(k) for f in fields(k)}
    return keys


def check_overrides(arguments: list[str]) -> None:
    """Refuse an override of an option that does not exist.

    Args:
        arguments: of the command line. Flags and Hydra's own options are left to Hydra.

    Raises:
        ValueError: naming the option, what was probably meant, and what exists.
    """
    keys = valid_keys()
    for argument in arguments:
        match = _OVERRIDE.match(argument)
        if not match or "=" not in argument or match["prefix"]:
            continue
        head, _, tail = match["key"].partition(".")
        if head == "hydra" or head.startswith("hydra/"):
            continue
        if head not in keys:
            raise ValueError(_message(head, keys))
        if tail and keys[head] and tail.partition(".")[0] not in keys[head]:
            raise ValueError(_message(tail, keys[head], group=head))


def _message(key: str, choices, group: str = "") -> str:
    close = difflib.get_close_matches(key, choices, n=1)
    meant = f", did you mean {close[0]!r}?" if close else ";"
    where = f"{group}." if group else ""
    return f"unknown option {where + key!r}{meant} options: {', '.join(sorted(choices))}"
