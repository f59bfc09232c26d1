"""Token ids with captions from files, such as the codes of images under a vector quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddiff.data.captioned_files import IMAGE, TEXT, Missing
from ddiff.data.columns import ColumnShape, FieldsDocuments, FieldsTable, TextColumn, TokenColumn
from ddiff.data.field_parts import check_parts, hash_keys, split_samples
from ddiff.data.paths import explain_errors, find_files, open_file, printable
from ddiff.data.pictures import LevelPicture, code_palette
from ddiff.data.records import read_records
from ddiff.data.text import check_text, text_lines
from ddiff.errors import ArgumentError, DataError

ARRAY_ENDING = ".npy"


class GridFormat(NamedTuple):
    """Form of the ids of a sample.

    Attributes:
        rows: rows of the grid.
        columns: columns of the grid.
        num_tokens: number of different tokens.
    """

    rows: int
    columns: int
    num_tokens: int

    @property
    def picture(self) -> LevelPicture:
        """Picture with a colour for each token: a map of the ids, not the image."""
        return LevelPicture(self.rows, self.columns, code_palette(self.num_tokens))

    @property
    def shape(self) -> ColumnShape:
        """Description of the column of ids."""
        size = self.rows * self.columns
        return ColumnShape("tokens", size, self.num_tokens, picture=self.picture)


class GridFiles(NamedTuple):
    """Files of a part of a data set.

    Attributes:
        ids: a .npy file [N,n] or [N,rows,columns], or a table (`read_records`).
        captions: text file with a caption per line, for a .npy file; None for a table.
    """

    ids: str
    captions: str | None = None


class _Samples(NamedTuple):
    """Ids [N,n] and captions of N samples; `present` [N] marks the samples with ids."""

    ids: NDArray[Any]
    present: NDArray[np.bool_]
    captions: list[str | None]


def read_token_grids(
    train: GridFiles,
    form: GridFormat,
    *,
    validation: GridFiles | None = None,
    held_out: float = 0.05,
    ids: str = "ids",
    caption: str = "caption",
    missing: Missing = "error",
) -> FieldsDocuments:
    """Read token ids with captions. A .npy file is memory-mapped.

    Args:
        train: files of the training samples.
        form: rows, columns and number of tokens.
        validation: files of the validation samples. None: a fraction `held_out`, by the hash of the
            ids.
        held_out: fraction in (0,1), used only without `validation`.
        ids, caption: columns or keys of a table.
        missing: "error" refuses a sample without ids or without caption; "absent" marks it.

    Returns documents with the columns "image" (the ids) and "text".
    """
    reader = _Reader(form, ids, caption, missing)
    trained = reader.read(train)
    hashes = _hash_ids(trained)
    if validation is None:
        chosen = split_samples(hashes, held_out, printable(train.ids))
        parts = [_select(trained, numbers) for numbers in chosen]
    else:
        held = reader.read(validation)
        check_parts(hashes, _hash_ids(held), printable(train.ids))
        parts = [trained, held]
    tables = []
    for part in parts:
        column = TokenColumn(part.ids, form.num_tokens, form.picture, part.present)
        tables.append(FieldsTable({IMAGE: column, TEXT: TextColumn(part.captions)}))
    return FieldsDocuments(tables[0], tables[1])


def _select(samples: _Samples, numbers: NDArray[np.int64]) -> _Samples:
    captions = [samples.captions[number] for number in numbers]
    return _Samples(samples.ids[numbers], samples.present[numbers], captions)


def _hash_ids(samples: _Samples) -> NDArray[np.uint64]:
    """Return the hashes of the ids; of the captions for samples without ids."""

    def keys() -> Iterable[bytes]:
        for ids, is_present, caption in zip(samples.ids, samples.present, samples.captions):
            yield ids.astype("<i8").tobytes() if is_present else (caption or "").encode()

    return hash_keys(keys())


class _Reader:
    """Reader of .npy files and tables. The arguments are those of `read_token_grids`."""

    def __init__(self, form: GridFormat, ids: str, caption: str, missing: Missing) -> None:
        self.form = form
        self.ids = ids
        self.caption = caption
        self.missing = missing

    def read(self, files: GridFiles) -> _Samples:
        [path] = find_files(files.ids)
        if path.lower().endswith(ARRAY_ENDING):
            samples = self._read_array(path, files.captions)
        elif files.captions is not None:
            raise ArgumentError(
                f"captions is only for ids in a .npy file; got captions = {files.captions!r} for "
                f"the table {printable(path)}, which has a column of captions. Leave out captions."
            )
        else:
            samples = self._read_table(path)
        if not len(samples.ids):
            raise DataError(f"{printable(path)} has no samples. Name a file with samples.")
        return samples

    def _read_array(self, path: str, captions: str | None) -> _Samples:
        with explain_errors(path):
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        rows, columns = self.form.rows, self.form.columns
        if ids.shape[1:] not in ((rows * columns,), (rows, columns)) or ids.dtype.kind not in "iu":
            raise DataError(
                f"{printable(path)} must hold integers [N,{rows * columns}] or [N,{rows},"
                f"{columns}], because rows = {rows} and columns = {columns}; it holds {ids.dtype} "
                f"{list(ids.shape)}. Correct rows and columns in [data], or the file."
            )
        if captions is None:
            raise ArgumentError(
                f"{printable(path)} has no captions. Name a text file with a caption per line: "
                'captions = "...".'
            )
        [captions_path] = find_files(captions)
        with open_file(captions_path) as file:
            lines = [line.strip() or None for line in text_lines(file, printable(captions_path))]
        if lines and lines[-1] is None:
            lines.pop()  # the text after the last line end
        if len(lines) != len(ids):
            raise DataError(
                f"{printable(captions_path)} must have one caption per sample of "
                f"{printable(path)}, {len(ids)} lines in all; it has {len(lines)}. Write an empty "
                "line for a missing caption."
            )
        for number, line in enumerate(lines):
            self._check_values(f"{printable(captions_path)} line {number + 1}", True, line)
        present = np.ones(len(ids), bool)
        return _Samples(ids.reshape(len(ids), -1), present, lines)

    def _read_table(self, path: str) -> _Samples:
        rows = []
        captions = []
        present = []
        for place, values in read_records(path, [self.ids, self.caption]):
            found, caption = values[self.ids], values[self.caption]
            if caption is not None and not check_text(caption, place).strip():
                caption = None
            self._check_values(place, found is not None, caption)
            rows.append(self._check_ids(found, place))
            captions.append(caption)
            present.append(found is not None)
        size = self.form.rows * self.form.columns
        ids = np.array(rows, np.int64).reshape(len(rows), size)
        return _Samples(ids, np.array(present, bool), captions)

    def _check_values(self, place: str, has_ids: bool, caption: str | None) -> None:
        if not has_ids and caption is None:
            raise DataError(f"{place} has neither ids nor a caption. Remove the sample.")
        if self.missing == "error" and not (has_ids and caption is not None):
            what = "no caption" if has_ids else "no ids"
            raise DataError(
                f'{place} has {what}. Add the missing value, or set missing = "absent" in [data] '
                "to use such samples without the field."
            )

    def _check_ids(self, found: Any, place: str) -> NDArray[np.int64]:
        """Return the ids [n] of a sample, 0 if they are missing."""
        rows, columns, num_tokens = self.form
        if found is None:
            return np.zeros(rows * columns, np.int64)
        try:
            ids = np.array(found)
        except ValueError:  # lists of different lengths
            ids = np.zeros(0)
        if ids.shape not in ((rows * columns,), (rows, columns)) or ids.dtype.kind not in "iu":
            raise DataError(
                f'{place}: "{self.ids}" must be a list of {rows * columns} integers, because rows '
                f"= {rows} and columns = {columns}; got {ids.dtype} {list(ids.shape)}. Correct "
                "rows and columns in [data], or the ids."
            )
        if ids.min() < 0 or ids.max() >= num_tokens:
            raise DataError(
                f'{place}: "{self.ids}" must lie in 0..{num_tokens - 1}, because num_tokens = '
                f"{num_tokens}; got {ids.min()}..{ids.max()}. Correct num_tokens in [data]."
            )
        return ids.reshape(-1).astype(np.int64)
