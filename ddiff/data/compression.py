"""Packed files: told by their first bytes, unpacked as they are read, and refused where they are damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa

from ddiff.data.paths import open_file, printable
from ddiff.errors import DataError

ENDINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
_HEADS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "Arrow",
    b"%PDF-": "PDF",
}
_BZIP2_BLOCKS = (
    b"1AY&SY",
    b"\x17\x72\x45\x38\x50\x90",
)  # after "BZh9": a text may begin with "BZh"
_HEAD_BYTES = 16


@contextmanager
def open_uncompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file that must not be packed; DataError says what it is."""
    with open_file(path) as file:
        head, whole = _peeked(file)
        if (found := format_of(head)) is not None:
            raise DataError(
                f"{printable(path)} is no plain text: it begins as a {found} file does. Unpack or convert it. A corpus may "
                'stay packed with [data] kind = "files", which reads gzip, bzip2, xz, zstd, lz4 and parquet by the endings.'
            )
        yield whole


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a text file, unpacked if its ending says that it is packed.

    DataError if the content is not what the ending says, or is cut off or damaged.
    """
    said = next(
        (packed for ending, packed in ENDINGS.items() if path.lower().endswith(ending)), None
    )
    with open_file(path) as file:
        head, whole = _peeked(file)
        _check_said(path, said, format_of(head), head)
        if said is None:
            yield whole
            return
        with _damage_explained(path, said):
            yield _READERS[said](whole)


def format_of(head: bytes) -> str | None:
    """Return the name of the packed or binary format that a file with these first bytes has; None for another one."""
    for mark, name in _HEADS.items():
        if head.startswith(mark) and (name != "bzip2" or head[4:10] in _BZIP2_BLOCKS):
            return name
    return None


def _check_said(path: str, said: str | None, found: str | None, head: bytes) -> None:
    if said == found:
        return
    if said is None:
        ending = next((ending for ending, packed in ENDINGS.items() if packed == found), None)
        remedy = (
            f"Name it ...{ending}"
            if ending
            else f'Convert it, or say format = "{found}" if it is parquet'
        )
        raise DataError(
            f"{printable(path)} is no plain text: it begins as a {found} file does. {remedy}."
        )
    what = (
        "is empty"
        if not head
        else f"begins with {head[:8]!r}" + (f", which is {found}" if found else "")
    )
    raise DataError(
        f"{printable(path)} is named as a {said} file, but it {what}. Download it again if it should be packed; else "
        "give it the ending of what it holds."
    )


@contextmanager
def _damage_explained(path: str, packed: str) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise _cut_off(path, packed) from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        if "Truncated" in str(error):
            raise _cut_off(path, packed) from error
        raise DataError(
            f"{printable(path)} is damaged: it cannot be unpacked as {packed} ({error}). Download or pack it again."
        ) from error


def _cut_off(path: str, packed: str) -> DataError:
    return DataError(
        f"{printable(path)} is cut off: the {packed} data ends before its end mark. Download or copy it again."
    )


class _Joined(io.RawIOBase):
    """A head that was read already, and the file after it."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = head
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(found) :] if self._head else b""
        buffer[: len(found)] = found
        return len(found)


def _peeked(file: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first bytes of a file, and the whole file still to be read: not every file system can seek."""
    head = file.read(_HEAD_BYTES)
    return head, io.BufferedReader(_Joined(head, file), 1 << 20)


def _by_arrow(codec: str) -> Callable[[BinaryIO], BinaryIO]:
    def reader(file: BinaryIO) -> BinaryIO:
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))

    return reader


_READERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _by_arrow("zstd"),
    "lz4": _by_arrow("lz4"),
}
