"""torchvision imports next to any build of torch, and nothing is declared where none is needed."""

import importlib.util
import subprocess
import sys

import torch

from jlcm import torchvision_compat

_IMPORT = """
import torch
{fault}
from jlcm.torchvision_compat import declare_missing_operators
first = declare_missing_operators()
assert declare_missing_operators() == first
import torchvision
network = torchvision.models.resnet18(num_classes=3).eval()
assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
torchvision.transforms.CenterCrop(2)(torch.zeros(3, 4, 4))
print("declared" if first else "loaded")
if first:
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        print("nms raises", type(error).__name__)
"""

_FAULT = """
def refuse(path):
    raise OSError(f"{path}: undefined symbol")
torch.ops.load_library = refuse
"""


def _run(fault: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT.format(fault=fault)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_works_where_the_extension_does_not_load() -> None:
    output = _run(_FAULT)
    assert "declared" in output and "nms raises" in output


def test_import_works_with_the_installed_builds() -> None:
    loads = torchvision_compat.extension_loads()
    assert ("loaded" if loads else "declared") in _run("")


def test_nothing_is_declared_for_matching_builds(monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(torchvision_compat, "_library", None)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert not torchvision_compat.declare_missing_operators()
    assert torchvision_compat._library is None
    assert loaded and all("_C" in path for path in loaded)


def test_nothing_is_declared_without_torchvision(monkeypatch) -> None:
    monkeypatch.setattr(torchvision_compat, "_library", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not torchvision_compat.declare_missing_operators()
    assert not torchvision_compat.extension_loads()
