"""Check the names of command-line overrides, and say which ones exist."""

import difflib
import re
from dataclasses import fields, is_dataclass
from importlib.util import find_spec

from hydra import compose
from omegaconf.errors import OmegaConfBaseException

from experiments.config import SCHEMAS, Config, configurations

#: Hydra's plugin for compute=NAME.
_PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
_INSTALL = "pip install -c constraints.txt -e '.[{extra}]'"
#: Its metadata ask for a cloudpickle older than joblib's; it works with the newer one.
_INSTALL_RAY = " && pip install --no-deps hydra-ray-launcher==1.2.2"
_OVERRIDE = re.compile(r"^(?P<prefix>[+~]{0,2})(?P<key>[A-Za-z_][\w./@:-]*)(?:=.*)?$", re.DOTALL)


def valid_keys() -> dict[str, set[str]]:
    """Top-level options, and the options below each group (of any of its choices)."""
    keys: dict[str, set[str]] = {}
    for field in fields(Config):
        kinds = (field.type, *SCHEMAS.get(field.name, {}).values())
        keys[field.name] = {f.name for k in kinds if is_dataclass(k) for f in fields(k)}
    return keys


def check_overrides(arguments: list[str]) -> None:
    """Check the overrides of a command line before Hydra runs it, for shorter messages.

    Args:
        arguments: of the command line. With flags (--multirun, --help) only the names of the
            options are checked, Hydra checks their values.

    Raises:
        ValueError: an option does not exist; names what was probably meant, and what exists. Or
            the launcher of `compute` is not installed, or needs a sweep.
        HydraException, OmegaConfBaseException: a value is of the wrong type, or no such choice.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    for argument in arguments:
        group, _, name = argument.partition("=")
        if group == "compute" and name in _PLUGINS:
            _check_launcher(name, sweep=bool(flags))
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
    if not flags:
        with configurations():
            compose("config", overrides=arguments)


def _check_launcher(name: str, *, sweep: bool) -> None:
    plugin = _PLUGINS[name]
    if find_spec(f"hydra_plugins.{plugin}") is None or (name == "ray" and find_spec("ray") is None):
        install = _INSTALL.format(extra="ray" if name == "ray" else "launchers")
        raise ValueError(
            f"compute={name} needs {plugin.replace('_', '-')}: "
            + install
            + (_INSTALL_RAY if name == "ray" else "")
        )
    if not sweep:
        raise ValueError(f"compute={name} launches sweeps: add -m")


def one_line(error: Exception) -> str:
    """An exception as one line, with its cause and without Hydra's search path."""
    text = str(error).partition("Config search path")[0]
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {str(error.__cause__).splitlines()[0]}"
    return "error: " + " ".join(text.split())


def _message(key: str, choices, group: str = "") -> str:
    close = difflib.get_close_matches(key, choices, n=1)
    meant = f", did you mean {close[0]!r}?" if close else ";"
    where = f"{group}." if group else ""
    return f"unknown option {where + key!r}{meant} options: {', '.join(sorted(choices))}"
