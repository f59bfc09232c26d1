"""Grids of pictures of drawn samples, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddiff.data.pictures import write_grid
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.sampling import DrawnSamples
from ddiff.runs.fields.values import FieldValues

COLUMNS = 8
SMALLEST_SIDE = 48  # pixels of a picture in the grid


def write_grids(data: RunFields, drawn: DrawnSamples, directory: Path) -> list[Path]:
    """Write one grid per shown field, and return the paths.

    The caption of a picture is the text of the sample. A file is named after its target, such as
    `samples-image-given-text.png`.
    """
    shown = shown_fields(data.fields, drawn)
    written = []
    for name in shown:
        ending = "" if len(shown) == 1 else f"-{name}"
        path = directory / f"samples-{drawn.target.file_name}{ending}.png"
        write_pictures(path, data.fields, drawn, name)
        written.append(path)
    return written


def shown_fields(fields: Mapping[str, FieldValues], drawn: DrawnSamples) -> list[str]:
    """Return the fields with pictures: the drawn ones, or the given ones if none is drawn."""
    named = [name for name in drawn.values if fields[name].picture is not None]
    return [name for name in named if name in drawn.target.drawn] or named


def write_pictures(
    path: str | Path, fields: Mapping[str, FieldValues], drawn: DrawnSamples, name: str
) -> None:
    """Write the pictures of one field of drawn samples to a PNG file."""
    picture = fields[name].picture
    assert picture is not None
    pictures = fields[name].draw(drawn.states[name])
    captions = []
    for index in range(len(pictures)):
        texts = []
        for column in drawn.values.values():
            value = column[index]
            if isinstance(value, Mapping) and "text" in value:
                texts.append(value["text"])
        captions.append(" ".join(texts))
    side = min(picture.rows, picture.columns)
    write_grid(str(path), pictures, captions, COLUMNS, max(1, -(-SMALLEST_SIDE // side)))
