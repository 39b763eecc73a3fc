"""Pictures of the original pipeline and of each method, from the same prompts and noise."""

import json
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from experiments.records import pictures_of
from experiments.tables.specs import Table
from experiments.tables.write import label
from jlcm.files import replacing

_MARGIN = 150  # pixels on the left, for names
_SIDE = 64  # least pixels of a picture


def picture_grid(path: Path, table: Table, tidy: pd.DataFrame, results_dir: Path) -> str | None:
    """Draw a line of pictures for the original and for each line and column of a table.

    Args:
        path: of the PNG file.
        table: its layout.
        tidy: from `experiments.tables.cells.tidy`.
        results_dir: with the runs' pictures.

    Returns:
        A caption with the prompts; None where the runs have no pictures.
    """
    rows: list[tuple[str, Image.Image]] = []
    prompts: list[str] = []
    for _, cell in tidy.drop_duplicates("runs").iterrows():
        found = pictures_of(results_dir, (cell["runs"].split() or [""])[0])
        if found is None:
            continue
        with Image.open(found) as picture:
            prompts = prompts or json.loads(picture.text["prompts"])
            picture = picture.convert("RGB")
        width, height = picture.size[0], picture.size[1] // 2
        if not rows:
            rows.append(("original", picture.crop((0, 0, width, height))))
        keys = [key for key in (*table.lines, *table.columns) if key != "model"]
        name = ", ".join(label(key, cell[key]) for key in keys)
        rows.append((name, picture.crop((0, height, width, 2 * height))))
    if not rows:
        return None
    scale = max(1, round(_SIDE * len(prompts) / rows[0][1].size[0]))
    width, height = (scale * x for x in rows[0][1].size)
    grid = Image.new("RGB", (_MARGIN + width, height * len(rows)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, (name, picture) in enumerate(rows):
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (_MARGIN, i * height))
        middle = (i + 0.5) * height
        draw.text((4, middle), name.replace(", ", "\n"), fill="black", font=font, anchor="lm")
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")
    return f"{table.title}, pictures of the same noise: {'; '.join(prompts)}."
