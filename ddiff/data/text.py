"""Decode files as text, and split the text into documents.

Every reader uses the same rules. The encoding is UTF-8. A byte order mark is dropped, and NUL is
refused. A line ends with "\\n", with "\\r", or with any number of "\\r" before a "\\n". Every line
end is converted to "\\n". A line is blank if it contains only white space. Blank lines separate
paragraphs. Files are read block by block, so that memory is needed only for the largest document.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from ddiff.errors import DataError

Split = Literal["file", "paragraph", "line"]

RULES = 2  # version of the rules; increase it to read cached documents again
_BLOCK = 1 << 20
_RETURNS = re.compile(r"(?<!\r)\r++\n")
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}


def text_documents(file: BinaryIO, name: str, split: Split) -> Iterator[tuple[int, str]]:
    """Yield (number, text) for each document of a file. Blank documents are left out.

    `split` is the unit of a document: "file", "paragraph" or "line". `number` is the number of the
    line or paragraph in the file, counted from 1; blank lines are counted too. `name`: name of the
    file in error messages.
    """
    if split == "file":
        documents: Iterable[tuple[int, str]] = [(1, "".join(_blocks(file, name)))]
    elif split == "line":
        documents = enumerate(text_lines(file, name), start=1)
    else:
        documents = enumerate(_paragraphs(text_lines(file, name)), start=1)
    for number, text in documents:
        if text and not text.isspace():
            yield number, text


def text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a file without line ends.

    The last line is the text after the last line end, which may be empty. `name`: name of the file
    in error messages.
    """
    # Pieces are joined once per line. Repeated concatenation would be quadratic for a file of one
    # line.
    pieces: list[str] = []
    for block in _blocks(file, name):
        first, *others = block.split("\n")
        pieces.append(first)
        for piece in others:
            yield "".join(pieces)
            pieces = [piece]
    yield "".join(pieces)


def check_text(text: str, name: str) -> str:
    """Return `text` unchanged if it is valid.

    Raises DataError if `text` is not a str, or contains NUL or a lone surrogate. `name`: name of
    the document in the message.
    """
    if not isinstance(text, str):
        found = repr(text)
        if len(found) > 80:
            found = f"{found[:60]} ..."
        hint = " Decode the bytes: .decode()." if isinstance(text, bytes | bytearray) else ""
        raise DataError(
            f"{name} is not text but {found} ({type(text).__name__}).{hint} Remove the value, or "
            "convert it to a string."
        )
    if "\0" in text:
        raise _nul_error(name, text.index("\0"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"{name} holds half of a surrogate pair at character {error.start} ({code}), which "
            "UTF-8 cannot encode. The cause is an emoji that was cut in half, or bytes that are "
            "not UTF-8. Remove the text, or replace the half character: "
            'text.encode("utf-8", "replace").decode().'
        ) from error
    return text


def _blocks(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a file block by block, with all line ends converted to "\\n".

    `name`: name of the file in error messages.
    """
    # Number of "\r" at the end of the last block. The next block shows whether these characters are
    # one line end or several.
    returns = 0
    for block in _decode_blocks(file, name):
        rest = block.lstrip("\r")
        returns += len(block) - len(rest)
        if not rest:
            continue
        if returns and not rest.startswith("\n"):
            yield "\n" * returns
        body = rest.rstrip("\r")
        returns = len(rest) - len(body)
        if "\r" in body:
            body = _RETURNS.sub("\n", body).replace("\r", "\n")
        yield body
    if returns:
        yield "\n" * returns


def _decode_blocks(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the decoded blocks of a file.

    Raises DataError with the offset of an invalid byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    block = file.read(_BLOCK)
    _check_encoding(block, name)
    offset = 0  # of the block in the file, in bytes
    before = 0  # characters before the block
    if block.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
        block = block[offset:]
    while True:
        carried = len(decoder.getstate()[0])  # bytes of a character that the last block began
        following = file.read(_BLOCK)
        try:
            text = decoder.decode(block, final=not following)
        except UnicodeDecodeError as error:
            raise _encoding_error(name, error, offset - carried + error.start) from error
        if "\0" in text:
            raise _nul_error(name, before + text.index("\0"))
        yield text
        if not following:
            return
        offset += len(block)
        before += len(text)
        block = following


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _check_encoding(head: bytes, name: str) -> None:
    # UTF-32 is checked before UTF-16, because the mark of UTF-32LE begins with that of UTF-16LE.
    for mark, encoding in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise DataError(
                f"{name} begins with the byte order mark of {encoding}, but UTF-8 is expected. "
                f"Convert the file, for instance with iconv -f {encoding[:6]} -t UTF-8."
            )


def _encoding_error(name: str, error: UnicodeDecodeError, offset: int) -> DataError:
    byte = error.object[error.start]
    if error.reason == "unexpected end of data":
        return DataError(
            f"{name} is not UTF-8: the file ends within a character, at offset {offset}. Copy or "
            "download the file again if it is truncated."
        )
    return DataError(
        f"{name} is not UTF-8: byte {byte:#04x} at offset {offset}. Convert the file to UTF-8, for "
        "instance from Windows-1252 or Latin-1, which have such bytes (iconv -f WINDOWS-1252 -t "
        "UTF-8)."
    )


def _nul_error(name: str, place: int) -> DataError:
    return DataError(
        f"{name} is not plain text: it holds the NUL character at character {place}, as binary and "
        "UTF-16 files do. Convert the file to UTF-8."
    )
