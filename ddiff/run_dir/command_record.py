"""Base classes of records that one command writes and reads: `pareto.json` and `clock.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddiff.errors import CheckpointError
from ddiff.run_dir.files import damage_error, read_text

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RecordPart(BaseModel):
    """Base class of the parts of a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(RecordPart):
    """Figure with its 95 % interval over independent samples or documents; None if unknown."""

    value: Finite
    interval: tuple[Finite, Finite] | None = None


class CommandRecord(RecordPart):
    """Record with a version, of which no older version exists.

    A subclass is one kind of file. It sets `newest_version`, the version that it writes, and
    `command`, the command that writes the file.
    """

    newest_version: ClassVar[int]
    command: ClassVar[str]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises CheckpointError if the file is damaged, or if a newer version of ddiff wrote it.
        """
        try:
            tree = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise damage_error(path, f"invalid JSON ({error})") from error
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version > cls.newest_version:
            raise CheckpointError(
                f"{path} was written by a newer version of ddiff: it has schema version {version}, "
                f"and this version of ddiff reads versions up to {cls.newest_version}. Install "
                f"that version of ddiff, or move the file away and repeat `{cls.command}`."
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise damage_error(path, f'the key "{key}" is invalid: {first["msg"]}') from error
