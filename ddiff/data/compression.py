"""Detect compressed files by their first bytes, decompress them as streams and detect damage."""

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
_SIGNATURES = {
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
# In a bzip2 file, one of these marks follows "BZh" and a digit. The marks are checked too, because
# a text may begin with "BZh".
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
_HEAD_BYTES = 16
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_uncompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file, which must not be compressed, to read bytes.

    Raises DataError if the file is compressed. The message names the format.
    """
    with open_file(path) as file:
        head, whole = _peek(file)
        if (found := detect_format(head)) is not None:
            raise DataError(
                f"{printable(path)} is not plain text: its first bytes are those of a {found} "
                'file. Decompress or convert the file, or set [data] kind = "files", which reads '
                "gzip, bzip2, xz, zstd, lz4 and parquet files by their endings."
            )
        yield whole


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a text file, and decompress it if its ending names a compression format.

    Raises DataError if the content does not match the ending, is truncated or is damaged.
    """
    expected = None
    for ending, name in ENDINGS.items():
        if path.lower().endswith(ending):
            expected = name
            break
    with open_file(path) as file:
        head, whole = _peek(file)
        _check_ending(path, expected, detect_format(head), head)
        if expected is None:
            yield whole
            return
        with _explain_damage(path, expected):
            yield _READERS[expected](whole)


def detect_format(head: bytes) -> str | None:
    """Return the compressed or binary format that the first bytes `head` show, or None for text."""
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature) and (name != "bzip2" or head[4:10] in _BZIP2_BLOCKS):
            return name
    return None


def _check_ending(path: str, expected: str | None, found: str | None, head: bytes) -> None:
    if expected == found:
        return
    if expected is None:
        endings = [ending for ending, name in ENDINGS.items() if name == found]
        if endings:
            remedy = f"Rename the file to ...{endings[0]}"
        else:
            remedy = f'Convert the file, or set format = "{found}" if it is parquet'
        raise DataError(
            f"{printable(path)} is not plain text: its first bytes are those of a {found} file. "
            f"{remedy}."
        )
    if not head:
        content = "is empty"
    elif found:
        content = f"begins with {head[:8]!r}, which is {found}"
    else:
        content = f"begins with {head[:8]!r}"
    raise DataError(
        f"{printable(path)} has the ending of a {expected} file, but it {content}. Download the "
        "file again if it should be compressed; otherwise give it the ending of its format."
    )


@contextmanager
def _explain_damage(path: str, compression: str) -> Iterator[None]:
    """Turn errors of a decompression library into a DataError that names file and compression."""
    try:
        yield
    except EOFError as error:
        raise _cut_off_error(path, compression) from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        if "Truncated" in str(error):
            raise _cut_off_error(path, compression) from error
        raise DataError(
            f"{printable(path)} is damaged: it cannot be decompressed as {compression} ({error}). "
            "Download or compress the file again."
        ) from error


def _cut_off_error(path: str, compression: str) -> DataError:
    return DataError(
        f"{printable(path)} is truncated: the {compression} data has no end mark. Download or copy "
        "the file again."
    )


class _PrependedFile(io.RawIOBase):
    """File object whose content is the bytes `head`, followed by the rest of `file`."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = head
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head[: len(buffer)]
        if found:
            self._head = self._head[len(found) :]
        else:
            found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _peek(file: BinaryIO) -> tuple[bytes, BinaryIO]:
    """Return the first bytes of a file, and a file object that starts with these bytes."""
    head = file.read(_HEAD_BYTES)
    # Not `seek(0)`: not every remote file system can seek.
    return head, io.BufferedReader(_PrependedFile(head, file), _BUFFER_BYTES)


def _arrow_reader(codec: str) -> Callable[[BinaryIO], BinaryIO]:
    def read(file: BinaryIO) -> BinaryIO:
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))

    return read


def _gzip_reader(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


_READERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": _gzip_reader,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _arrow_reader("zstd"),
    "lz4": _arrow_reader("lz4"),
}
