"""Where the texts of a large corpus come from: data sets of the hub, and files anywhere, read in order by `datasets`.

Nothing is copied: texts stream past. A chunk's cursor is the state of the stream after it, from which another process goes
on without reading what came before (the file under way excepted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import datasets
import fsspec
from datasets import IterableDataset, load_dataset

from ddiff.data.documents import base_name, find_files
from ddiff.data.pretrained import is_folder, is_place
from ddiff.data.tokenising import DOCUMENTS_AT_ONCE, TRAIN, Chunk
from ddiff.errors import ArgumentError, DataError, nearest

# The library would tell the hub of every opening, that of local files too. Without a network each such request waits.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

Format = Literal["parquet", "json", "text"]
Split = Literal["file", "paragraph", "line"]

_ENDINGS: dict[str, Format] = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text", ".text": "text",
}  # fmt: skip
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_SAMPLED = {"file": "document", "paragraph": "paragraph", "line": "line"}
_MARKS = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "mtime", "LastModified", "last_modified", "created")


@final
@dataclass(frozen=True)
class TextSource:
    """The texts of one column; `name` is for messages, `identity` (JSON) tells sources apart, `load` opens the stream.

    Blank and missing texts are left out.
    """

    name: str
    identity: Any
    column: str
    load: Callable[[], IterableDataset]
    explain: Callable[[], str] = lambda: ""

    def __str__(self) -> str:
        return self.name

    def chunks(self, cursor: Any = None, part: str | None = TRAIN) -> Iterator[Chunk]:
        """The texts after a cursor (None: all) in order; DataError for a column that is missing or not of text, and for
        what cannot be read."""
        stream = self._opened()
        if cursor is not None:
            stream.load_state_dict(cursor)
        batches = stream.iter(DOCUMENTS_AT_ONCE)
        while (batch := self._next(batches)) is not None:
            texts = [text for text in self._column(batch) if text is not None and text and not text.isspace()]
            if texts:
                yield Chunk(texts, stream.state_dict(), part)

    def _opened(self) -> IterableDataset:
        try:
            stream = self.load()
        except DataError:
            raise
        except Exception as error:  # of any library that reads some format from some place
            raise self._unreadable(error) from error
        if stream.column_names is None:
            return stream
        self._check_named(stream.column_names)
        return stream.select_columns([self.column])

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except Exception as error:
            raise self._unreadable(error) from error

    def _column(self, batch: dict[str, list[Any]]) -> list[str | None]:
        self._check_named(list(batch))
        for text in batch[self.column]:
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f'{self.name}: the column "{self.column}" must hold text; it holds {text!r} ({type(text).__name__}). '
                    "Name the column of the text: column = ..."
                )
        return batch[self.column]

    def _check_named(self, columns: Sequence[str]) -> None:
        if self.column not in columns:
            raise DataError(
                f'{self.name} has no column "{self.column}"; it has {sorted(columns)}.{nearest(self.column, columns)} Name '
                "the column of the text: column = ..."
            )

    def _unreadable(self, error: Exception) -> DataError:
        first = (str(error).splitlines() or [""])[0]
        return DataError(f"{self.name} cannot be read: {type(error).__name__}: {first}. {self.explain()}".rstrip())


def hub_texts(
    path: str, *, config: str | None = None, split: str = "train", column: str = "text", revision: str | None = None
) -> TextSource:
    """A data set of the hub, or a local folder of files, streamed.

    It is known by its name, split and `revision`: pin one (a commit), since without it what was tokenised first stays.
    """
    if Path(path).is_file() or (is_place(path) and not is_folder(path)):
        raise DataError(
            f"The data set {path!r} cannot be read: it is no folder, and no name on the hub (NAME or OWNER/NAME). Correct "
            "it, or name the folder of the data files, relative to where ddiff runs; single files are read by "
            '[data] kind = "files".'
        )
    return TextSource(
        f"The data set {path} ({split})",
        {"hub": path, "config": config, "split": split, "column": column, "revision": revision},
        column,
        lambda: load_dataset(path, config, split=split, revision=revision, streaming=True),
        lambda: (
            'Check name, config and split. One made by a script is read with revision = "refs/convert/parquet". Without a '
            "connection, download it on a machine that has one (`hf download "
            f"{path} --repo-type dataset --local-dir FOLDER`) and name the folder."
        ),
    )


def file_texts(
    patterns: Sequence[str], *, format: Format | None = None, column: str = "text", split: Split = "line"
) -> TextSource:
    """Files of parquet, JSON lines or text, by fsspec paths and globs, in the order of the patterns, then of their names.

    `format` is told by the endings, compressed or not. A document is a row, or a `split` of a text file. Files are known by
    name, size and time or tag of change: they are not read for it. DataError when there are none, or of several formats.
    """
    paths = [path for pattern in patterns for path in find_files(pattern)]
    found = format or _format(paths)
    options = {"sample_by": _SAMPLED[split]} if found == "text" else {}

    def load() -> IterableDataset:
        return load_dataset(found, data_files=paths, split="train", streaming=True, **options)

    return TextSource(
        f"{', '.join(patterns)} ({len(paths)} files of {found})",
        {"files": [_mark(path) for path in paths], "format": found, "column": column, **options},
        "text" if found == "text" else column,
        load,
        lambda: _undecodable(paths) if found != "parquet" else "",
    )


def _format(paths: Sequence[str]) -> Format:
    found = {_ENDINGS.get(_ending(path)) for path in paths}
    if len(found) > 1 or None in found:
        endings = sorted({_ending(path) for path in paths})
        raise ArgumentError(
            f"files: the format cannot be told from the endings {endings}; one of {sorted(set(_ENDINGS.values()))} is due "
            "for all files. Say it (format = ...), or name files of one format."
        )
    (only,) = found
    assert only is not None
    return only


def _ending(path: str) -> str:
    name = base_name(path)
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return name[name.rfind(".") :].lower() if "." in name else ""


def _mark(path: str) -> list[Any]:
    """What changes when a file does: its name, size, and tag or time of change."""
    system, place = fsspec.url_to_fs(path)
    info = system.info(place)
    return [base_name(path), info.get("size"), next((str(info[key]) for key in _MARKS if info.get(key)), "")]


def _undecodable(paths: Sequence[str]) -> str:
    """Which file is not UTF-8, and where, if one is."""
    for path in paths:
        with fsspec.open(path, "rb", compression="infer") as file:
            offset = 0
            for line in file:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return (
                        f"{path} is not UTF-8: byte {line[error.start]:#04x} at offset {offset + error.start}. Convert it "
                        "to UTF-8, for instance with iconv."
                    )
                offset += len(line)
    return ""
