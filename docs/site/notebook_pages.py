"""Notebooks as pages: text, code and the outputs that the notebook was committed with."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any


def join(text: str | list[str]) -> str:
    """Return a text of a notebook, which may be stored as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def fence(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


class NotebookPage:
    """A notebook as Markdown, and the pictures of its outputs by file name."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.pictures: dict[str, bytes] = {}
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = [part for cell in cells for part in self.convert_cell(cell)]
        download = f"[Download this notebook]({path.name})"
        self.markdown = "\n\n".join([parts[0], download, *parts[1:]]) + "\n"

    def convert_cell(self, cell: dict[str, Any]) -> list[str]:
        source = join(cell["source"])
        if cell["cell_type"] == "markdown":
            return [source]
        outputs = [self.convert_output(output) for output in cell["outputs"]]
        return [fence(source, "python"), *outputs]

    def convert_output(self, output: dict[str, Any]) -> str:
        if output["output_type"] == "stream":
            return fence(join(output["text"]), "text")
        data = output["data"]
        if "image/png" in data:
            name = f"{self.name}-{len(self.pictures) + 1}.png"
            self.pictures[name] = base64.b64decode(join(data["image/png"]))
            return f"![output of the cell above]({name})"
        return fence(join(data["text/plain"]), "text")
