"""README.md of a folder with a packed model, which model hubs show."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from jlcm.files import replacing
from jlcm.footprint import footprint
from jlcm.reading import packed_files

#: Cards with this line are written again, others belong to somebody.
_MARK = "<!-- written by jlcm -->"

_CARD = """---
library_name: transformers
{base_tags}tags:
- jlcm
- quantized
---
{mark}

# {title}, packed by jlcm

Weights of {base} as codes of a few bits that point into small codebooks.
They stay packed in memory: a layer is decoded when it runs.

| | |
|---|---|
| method | {method} |
| goal alpha | {alpha:g} |
| alpha of the compressed layers, fp16 bytes over packed bytes | {alpha_layers:.3f} |
| alpha of everything, 16-bit original over the files named below | {alpha_total:.3f} |
| original at 16 bits | {reference:,} bytes |
| {files} | {file_bytes:,} bytes |
| of which codes, codebooks, scales, orders and outliers | {packed:,} bytes |

## Load

With jlcm installed:

```python
import jlcm  # before the model is loaded
from transformers import {kind}

model = {kind}.from_pretrained("FOLDER")
```

Without `import jlcm` transformers warns of an unknown quantization type, and stops because the
sizes of weights do not match.

## Limits

- For inference: the model has no parameters that could be trained.
- Decoding costs time at each forward; there are no fused kernels.
- How much accuracy is lost depends on the model and the goal, and was not measured for this card:
  evaluate before use.
{notes}"""


def write_model_card(model: nn.Module, folder: Path, original: str | None) -> None:
    """Write README.md beside the files of a packed model of transformers.

    Args:
        model: as it was saved.
        folder: with its files. A README.md that jlcm did not write is left alone.
        original: name or folder of the model that was compressed, if known.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder / "README.md"
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8"):
        return
    with replacing(path) as temporary:
        temporary.write_text(model_card(model, folder, original), encoding="utf-8")


def model_card(model: nn.Module, folder: Path, original: str | None) -> str:
    """Text of the card: what was done, true bytes, how to load, limits."""
    size, summary, base = footprint(folder), model.compression, _base_model(original)
    files = [file.name for file in packed_files(folder)]
    if len(files) > 3:
        files[1:-1] = [f"{len(files) - 2} shards"]
    return _CARD.format(
        mark=_MARK,
        base_tags=f"base_model: {base}\nbase_model_relation: quantized\n" if base else "",
        title=(base or type(model).__name__).rpartition("/")[2],
        base=f"`{base}`" if base else f"a `{type(model).__name__}`",
        method=_method(summary.options),
        alpha=summary.alpha,
        alpha_layers=size.alpha_layers,
        alpha_total=size.alpha_total,
        reference=size.reference_total,
        files=" + ".join(files),
        file_bytes=size.file_bytes,
        packed=size.payload - size.other,
        kind=type(model).__name__,
        notes="".join(f"- {note}\n" for note in summary.notes),
    )


def _base_model(name: str | None) -> str | None:
    """Name of the original on a hub, None for a folder of this machine."""
    if not name or Path(name).exists():
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _method(options: dict[str, Any]) -> str:
    if "method" in options:
        return options["method"]
    encoding, init = options["encoding"]["kind"], options["init"]["method"]
    return f"jlcm, encoding {encoding}, initialised by {init} clustering"
