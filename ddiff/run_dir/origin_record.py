"""Record of an import: `origin.json`, which names the published files of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from ddiff.run_dir.command_record import CommandRecord, RecordPart
from ddiff.run_dir.files import ORIGIN


class ImportedFile(RecordPart):
    """Size and SHA-256 of a file that was read."""

    bytes: int
    sha256: str


class OriginRecord(CommandRecord):
    """Origin of the weights of an imported run.

    Attributes:
        ddiff: version of ddiff that imported the files.
        source: folder, file or hub name, as the user wrote it.
        revision: commit of the repository on the hub; None for local files.
        layout: layout that read the files, with its plugin and version.
        tokenizer: source of the tokenizer.
        step: number of training steps that the files record; None if they record none.
        is_average: whether the weights are moving averages of a training checkpoint.
        files: the files that were read, by name.
        notes: remarks of the layout.
    """

    newest_version: ClassVar[int] = 1
    command: ClassVar[str] = "ddiff import"

    schema_version: Literal[1] = 1
    ddiff: str
    source: str
    revision: str | None = None
    layout: str
    tokenizer: str
    step: int | None = None
    is_average: bool = False
    files: dict[str, ImportedFile]
    notes: tuple[str, ...] = ()


def find_origin(directory: Path) -> OriginRecord | None:
    """Return the record of an imported run, or None if the run was trained."""
    path = directory / ORIGIN
    return OriginRecord.read(path) if path.exists() else None
