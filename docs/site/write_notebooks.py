"""Execute the notebooks and write their outputs into the files.

    python docs/site/write_notebooks.py [NAME ...]

Notebooks are committed with outputs, which the site shows. The script drops what differs between
machines: progress lines, times of execution, versions, and second formats of pictures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TIMEOUT = 1200  # seconds for one cell, on a busy machine


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute_notebook(notebook: NotebookNode, folder: Path) -> None:
    """Execute a notebook in a folder, and put the outputs into it."""
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()


def drop_machine(notebook: NotebookNode) -> None:
    """Remove the parts of the outputs and of the metadata that depend on the machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" not in cell:
            continue
        # Progress lines are the only outputs of this type: pictures are results of cells.
        cell.outputs = [one for one in cell.outputs if one.output_type != "display_data"]
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)
            if "image/png" in output.get("data", {}):
                output.data["text/plain"] = "picture"


def main(names: list[str]) -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = read_notebook(path)
        with tempfile.TemporaryDirectory() as folder:
            execute_notebook(notebook, Path(folder))
        drop_machine(notebook)
        nbformat.write(notebook, path)
        print(f"Wrote {path.name}.")


if __name__ == "__main__":
    main(sys.argv[1:])
