"""Images with captions from files: a folder, a manifest, or parquet files.

Every image is checked when the data set is made, and decoded when it is read. Images of levels are
decoded once, into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from ddiff.data.arrow import load_or_build_table
from ddiff.data.cache import Cache, fingerprint
from ddiff.data.columns import FieldsDocuments, FieldsTable, TextColumn, TokenColumn, VectorColumn
from ddiff.data.documents import file_fingerprint
from ddiff.data.field_parts import check_parts, hash_keys, split_samples
from ddiff.data.image_files import (
    ImageFiles,
    ImageFormat,
    ImageRows,
    ImageSource,
    check_header,
    decode_image,
)
from ddiff.data.paths import base_name, find_train_and_validation, printable
from ddiff.data.records import ROWS_AT_ONCE, read_records
from ddiff.data.text import check_text
from ddiff.errors import DataError
from ddiff.progress import show_progress

IMAGE = "image"
TEXT = "text"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Missing = Literal["error", "absent"]
"""Reaction to a sample that lacks a field: DataError, or a mark in the column."""


class MissingRules(NamedTuple):
    """Reactions to images that are missing or unreadable, and to missing captions."""

    unreadable: Missing = "error"
    captions: Missing = "error"


STRICT = MissingRules()


class CaptionedImage(NamedTuple):
    """Sample of a manifest or folder.

    Attributes:
        path: file of the image; None if the manifest names none.
        caption: caption; None if it is missing or blank.
        key: text by which samples are divided, equal for all captions of an image.
        place: name of the sample in messages.
    """

    path: str | None
    caption: str | None
    key: str
    place: str


# ---------------------------------------------------------------------- files of images


def read_image_folder(
    folder: str,
    form: ImageFormat,
    *,
    manifest: str | None = None,
    validation: str | None = None,
    held_out: float = 0.05,
    image: str = "image_path",
    caption: str = "caption",
    rules: MissingRules = STRICT,
    cache: Cache | None = None,
) -> FieldsDocuments:
    """Read image files with captions.

    Args:
        folder: folder from which the paths in a manifest start. Without manifest, all images in it
            and its subfolders are read, and NAME.txt is the caption of NAME.png.
        form: format to which images are converted.
        manifest: JSON, JSON lines, CSV or parquet file in `folder` with the path and the caption of
            each sample. An image may occur several times.
        validation: manifest of the validation samples. None: a fraction `held_out`, by the hash of
            the value `image_id`, or of the path if the manifest has no `image_id`.
        held_out: fraction in (0,1), used only without `validation`.
        image, caption: keys or columns of a manifest.
        rules: reactions to missing and unreadable values.
        cache: cache of decoded levels. None: they are kept in memory.

    Returns documents with the columns "image" and "text".
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"There is no folder {printable(folder)}. Name the folder of the images.")
    if manifest is None:
        samples = _find_images(root)
    else:
        samples = list(_read_manifest(root, manifest, image, caption))
    _check_samples(samples, folder, rules)
    hashes = _hash_images(samples)
    if validation is None:
        train, held = split_samples(hashes, held_out, printable(folder))
        parts = [[samples[number] for number in numbers] for numbers in (train, held)]
    else:
        others = list(_read_manifest(root, validation, image, caption))
        _check_samples(others, validation, rules)
        check_parts(hashes, _hash_images(others), folder)
        parts = [samples, others]
    tables = []
    for part in parts:
        source = ImageFiles([sample.path for sample in part])
        captions = [sample.caption for sample in part]
        tables.append(_make_table(source, captions, form, rules, cache))
    return FieldsDocuments(tables[0], tables[1])


def _find_images(root: Path) -> list[CaptionedImage]:
    samples = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in IMAGE_ENDINGS or not path.is_file():
            continue
        beside = path.with_suffix(".txt")
        caption = _read_caption(beside) if beside.is_file() else None
        key = path.relative_to(root).as_posix()
        samples.append(CaptionedImage(str(path), caption, key, key))
    return samples


def _read_caption(path: Path) -> str:
    name = printable(str(path))
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} cannot be read as UTF-8 ({error}). Correct the caption."
        ) from error
    return check_text(text.strip(), name)


def _read_manifest(root: Path, manifest: str, image: str, caption: str) -> Iterator[CaptionedImage]:
    for place, values in read_records(str(root / manifest), [image, caption], ["image_id"]):
        path, text = values[image], values[caption]
        if path is not None and not isinstance(path, str):
            raise DataError(f"{place}: {image} must be a path; got {path!r}. Correct the manifest.")
        if text is not None:
            check_text(text, place)
        key = path if values["image_id"] is None else str(values["image_id"])
        full = None if path is None else str(root / path)
        yield CaptionedImage(full, text, key or place, place)


def _check_samples(samples: list[CaptionedImage], source: str, rules: MissingRules) -> None:
    """Replace blank captions and paths without file by None, in place.

    Raises DataError for missing values that `rules` refuses, and if there are no samples.
    """
    if not samples:
        raise DataError(
            f"{printable(source)} has no images. Name a folder with images "
            f"({', '.join(IMAGE_ENDINGS)}) or a manifest with samples."
        )
    for number, sample in enumerate(samples):
        caption = sample.caption if sample.caption and not sample.caption.isspace() else None
        path = sample.path
        if path is None or not Path(path).is_file():
            if rules.unreadable == "error":
                what = "no image" if path is None else f"no image: there is no file {path}"
                raise _missing_error(sample.place, what, "unreadable")
            path = None
        _check_values(sample.place, path is not None, caption is not None, rules)
        samples[number] = sample._replace(path=path, caption=caption)


def _check_values(place: str, has_image: bool, has_caption: bool, rules: MissingRules) -> None:
    if not has_image and not has_caption:
        raise DataError(f"{printable(place)} has neither an image nor a caption. Remove it.")
    if not has_image and rules.unreadable == "error":
        raise _missing_error(place, "no image", "unreadable")
    if not has_caption and rules.captions == "error":
        raise _missing_error(place, "no caption", "captionless")


def _missing_error(place: str, what: str, key: str) -> DataError:
    return DataError(
        f'{printable(place)} has {printable(what)}. Add it, or set {key} = "absent" in [data] to '
        "use such samples without the field."
    )


def _hash_images(samples: Sequence[CaptionedImage]) -> NDArray[np.uint64]:
    return hash_keys(sample.key.encode() for sample in samples)


# ---------------------------------------------------------------------- parquet files

_SCHEMA = pa.schema(
    [("image", pa.large_binary()), ("text", pa.large_string()), ("place", pa.string())]
)


def read_image_tables(
    files: Sequence[str],
    form: ImageFormat,
    *,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    image: str = "image",
    caption: str = "caption",
    rules: MissingRules = STRICT,
    cache: Cache | None = None,
) -> FieldsDocuments:
    """Read encoded images with captions from parquet files.

    A value of the column `image` is bytes, or a structure with the key `bytes`, as the library
    datasets writes it. The other arguments are those of `read_image_folder`; without `validation`,
    samples are held out by the hash of the image.
    """
    paths, validation_paths = find_train_and_validation(files, validation)
    reader = _ParquetReader(image, caption, rules)
    table, identity = reader.read(paths, cache)
    hashes = _hash_rows(table)
    if validation_paths:
        held_table, held_identity = reader.read(validation_paths, cache)
        check_parts(hashes, _hash_rows(held_table), ", ".join(files))
        parts = [
            ImageRows(table, np.arange(len(table)), identity),
            ImageRows(held_table, np.arange(len(held_table)), held_identity),
        ]
    else:
        chosen = split_samples(hashes, held_out, ", ".join(files))
        parts = [ImageRows(table, numbers, identity) for numbers in chosen]
    tables = []
    for part in parts:
        captions = part.table.data.column("text").take(pa.array(part.numbers)).to_pylist()
        tables.append(_make_table(part, captions, form, rules, cache))
    return FieldsDocuments(tables[0], tables[1])


class _ParquetReader:
    """Reader of the columns of images and captions. `rules`: reactions to missing values."""

    def __init__(self, image: str, caption: str, rules: MissingRules) -> None:
        self.image = image
        self.caption = caption
        self.rules = rules

    def read(self, paths: Sequence[str], cache: Cache | None) -> tuple[Dataset, str]:
        """Return a memory-mapped table of all files, and its identifier."""
        inputs = {
            "files": [[base_name(path), file_fingerprint(path)] for path in paths],
            "columns": [self.image, self.caption],
            "rules": list(self.rules),
        }
        table = load_or_build_table(
            _SCHEMA,
            lambda: self._batches(paths),
            kind="images",
            make_inputs=lambda: inputs,
            cache=cache,
            file="images.arrow",
        )
        if not len(table):
            raise DataError(f"{', '.join(map(printable, paths))}: no samples. Name other files.")
        return table, fingerprint(inputs)

    def _batches(self, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with show_progress(len(paths), "reading images") as bar:
            for path in paths:
                records = read_records(path, [self.image, self.caption])
                rows = (self._check_row(place, values) for place, values in records)
                while block := list(islice(rows, ROWS_AT_ONCE)):
                    yield pa.RecordBatch.from_pylist(block, schema=_SCHEMA)
                bar.advance(1)

    def _check_row(self, place: str, values: dict[str, Any]) -> dict[str, Any]:
        found, caption = values[self.image], values[self.caption]
        content = found.get("bytes") if isinstance(found, dict) else found
        if content is not None and not isinstance(content, bytes):
            raise DataError(
                f'{place}: the column "{self.image}" must hold encoded images, as bytes or as a '
                f"structure with the key bytes; it holds {type(content).__name__}. Write the "
                "bytes of the image files into the column."
            )
        if caption is not None and not check_text(caption, place).strip():
            caption = None
        _check_values(place, content is not None, caption is not None, self.rules)
        return {"image": content, "text": caption, "place": place}


def _hash_rows(table: Dataset) -> NDArray[np.uint64]:
    """Return the hashes of the images; of the captions for samples without image."""
    keys = (row["image"] if row["image"] is not None else row["text"].encode() for row in table)
    return hash_keys(keys)


# ---------------------------------------------------------------------- columns


def _make_table(
    source: ImageSource,
    captions: Sequence[str | None],
    form: ImageFormat,
    rules: MissingRules,
    cache: Cache | None,
) -> FieldsTable:
    column: TokenColumn | VectorColumn
    if form.values == "levels":
        column = _make_level_column(source, form, rules, cache)
    else:
        column = _make_patch_column(source, form, rules)
    for number, caption in enumerate(captions):
        if caption is None and not column.present[number]:
            raise DataError(
                f"{printable(source.name(number))} cannot be decoded, and the sample has no "
                "caption. Remove the sample."
            )
    return FieldsTable({IMAGE: column, TEXT: TextColumn(captions)})


def _make_patch_column(source: ImageSource, form: ImageFormat, rules: MissingRules) -> VectorColumn:
    """Make a column of patches, which are decoded when they are read."""
    present = np.zeros(len(source), bool)
    with show_progress(len(source), "checking images") as bar:
        for number in range(len(source)):
            present[number] = _is_readable(source, number, form, rules)
            bar.advance(1)
    picture = form.picture
    positions, width = form.shape.positions, form.shape.width
    assert positions is not None
    assert width is not None

    def read(numbers: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        pixels = np.zeros((len(numbers), form.rows, form.columns, form.channels), np.uint8)
        for row, number in enumerate(numbers.tolist()):
            if present[number]:
                pixels[row] = _decode(source, number, form)
        return form.to_patches(pixels), present[numbers]

    identity = fingerprint([source.fingerprint(), repr(form), present.tolist()])
    return VectorColumn(read, len(source), positions, width, picture, identity, present=present)


def _is_readable(source: ImageSource, number: int, form: ImageFormat, rules: MissingRules) -> bool:
    """Check an image. Raises DataError for an unreadable one unless it may be absent.

    If unreadable images are absent, the image is decoded, because a header does not show that a
    file is truncated.
    """
    if not source.has(number):
        return False
    if rules.unreadable == "error":
        check_header(source.open(number), source.name(number))
        return True
    try:
        _decode(source, number, form)
    except DataError:
        return False
    return True


def _decode(source: ImageSource, number: int, form: ImageFormat) -> NDArray[np.uint8]:
    return decode_image(source.open(number), source.name(number), form)


def _make_level_column(
    source: ImageSource, form: ImageFormat, rules: MissingRules, cache: Cache | None
) -> TokenColumn:
    """Make a column of levels. All images are decoded once; the levels are stored in the cache."""
    if cache is None:
        levels, present = _decode_levels(source, form, rules)
    else:

        def build(folder: Path) -> None:
            found, marks = _decode_levels(source, form, rules)
            np.save(folder / "levels.npy", found)
            np.save(folder / "present.npy", marks)

        inputs = {"images": source.fingerprint(), "format": repr(form), "rules": list(rules)}
        entry = cache.load_or_build("image_levels", inputs, build)
        levels = np.load(entry / "levels.npy", mmap_mode="r")
        present = np.load(entry / "present.npy")
    return TokenColumn(levels, form.levels, form.picture, present)


def _decode_levels(
    source: ImageSource, form: ImageFormat, rules: MissingRules
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the levels [N,n] of all images, and which of them exist [N]."""
    levels = np.zeros((len(source), form.rows * form.columns), np.uint8)
    present = np.zeros(len(source), bool)
    with show_progress(len(source), "decoding images") as bar:
        for number in range(len(source)):
            bar.advance(1)
            if not source.has(number):
                continue
            try:
                pixels = _decode(source, number, form)
            except DataError:
                if rules.unreadable == "error":
                    raise
                continue
            levels[number] = form.to_levels(pixels[None])[0]
            present[number] = True
    return levels, present
