"""The data kinds `text`, `files` and `jsonl` split a file into the same documents."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddiff.data import text as text_module
from ddiff.data.documents import read_text_files
from ddiff.data.jsonl import read_json_lines
from ddiff.data.sources import open_file_source
from ddiff.data.text import text_documents
from ddiff.errors import DataError

SPLITS: tuple[Any, ...] = ("file", "line", "paragraph")
PARAGRAPHS = [f"paragraph {number} is here" for number in range(60)]
ODD = st.text("ab \t\n\r\u3000\u2028\x0b\ufeff\u00e9\U0001f600", max_size=60)


def from_text(path: Path, split: Any) -> list[str]:
    (path.parent / "held_out.txt").write_text("held out")
    documents = read_text_files(
        [str(path)], validation=[str(path.parent / "held_out.txt")], split=split
    )
    return list(documents.train["text"])


def from_files(path: Path, split: Any) -> list[str]:
    return [
        text
        for chunk in open_file_source([str(path)], split=split).chunks()
        for text in chunk.texts
    ]


def expected(written: str, split: str) -> list[str]:
    """Return the documents of a whole text by the rule of `ddiff.data.text`."""
    plain = re.sub(r"\r*\n|\r", "\n", written.removeprefix("\ufeff"))
    if split == "file":
        found = [plain]
    elif split == "line":
        found = plain.split("\n")
    else:
        blank_as_empty = "\n".join("" if line.isspace() else line for line in plain.split("\n"))
        found = [piece.strip("\n") for piece in re.split(r"\n\n+", blank_as_empty)]
    return [text for text in found if text.strip()]


@pytest.mark.parametrize("split", SPLITS)
@given(written=ODD, block=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_text_documents_do_not_depend_on_the_read_block_size(
    split: Any, written: str, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # At least 3, because a byte order mark must be in the first block.
        patch.setattr(text_module, "_BLOCK", max(3, block))
        found = list(text_documents(io.BytesIO(written.encode()), "a.txt", split))
    assert [text for _, text in found] == expected(written, split)
    assert [number for number, _ in found] == sorted({number for number, _ in found})


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(12))
def test_data_kinds_text_and_files_read_the_same_documents(
    tmp_path: Path, split: Any, seed: int
) -> None:
    pieces = ["a b", "c", "\r", "\n", "\r\n", "\r\r\n", " ", "\t", "\ufeff", "\u2028", "é"]
    written = "word" + "".join(pieces[(seed * 7 + i * i * 5 + i) % len(pieces)] for i in range(40))
    (tmp_path / "a.txt").write_bytes(written.encode())
    assert (
        from_text(tmp_path / "a.txt", split)
        == from_files(tmp_path / "a.txt", split)
        == expected(written, split)
    )


ENDS = {"unix": "\n", "old Mac": "\r", "Windows": "\r\n", "Windows, written twice": "\r\r\n"}


@pytest.mark.parametrize("reader", [from_text, from_files])
@pytest.mark.parametrize("split", ["line", "paragraph"])
@pytest.mark.parametrize("end", list(ENDS))
def test_text_readers_accept_lf_crlf_and_cr_line_ends(
    tmp_path: Path, reader: Any, split: str, end: str
) -> None:
    content = "\ufeff" + (ENDS[end] * 2).join(PARAGRAPHS) + ENDS[end]
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert reader(tmp_path / "a.txt", split) == PARAGRAPHS


@pytest.mark.parametrize("reader", [from_text, from_files])
@pytest.mark.parametrize("blank", ["", " \t", "\u3000", "\x0c"])
def test_text_readers_separate_paragraphs_at_blank_lines(
    tmp_path: Path, reader: Any, blank: str
) -> None:
    (tmp_path / "a.txt").write_text(f"\n{blank}\n".join(PARAGRAPHS))
    assert reader(tmp_path / "a.txt", "paragraph") == PARAGRAPHS


REFUSED = {
    "NUL": (b"fine\na\0b\n", "NUL character at character 6"),
    "NUL behind many characters": (
        "é".encode() * 600_000 + b"\0",
        "NUL character at character 600000",
    ),
    "Windows-1252": ("“quoted”".encode("cp1252"), r"0x93 at offset 0.*WINDOWS-1252"),
    "Windows-1252 far on": (b"x" * 1_500_000 + b"\x93", r"0x93 at offset 1500000"),
    "a byte amiss where blocks meet": (b"x" * (2**20 - 1) + b"\xc3\xff", "0xc3 at offset 1048575"),
    "UTF-16": ("text".encode("utf-16"), "UTF-16LE.*iconv"),
    "UTF-16 of the other order": (b"\xfe\xff\0t", "UTF-16BE"),
    "UTF-32": ("text".encode("utf-32"), "UTF-32LE"),
    "UTF-16 without a mark": ("text".encode("utf-16-le"), "NUL"),
    "cut within a character": ("café".encode()[:-1], "ends within a character, at offset 3"),
}


@pytest.mark.parametrize("reader", [from_text, from_files])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", list(REFUSED))
def test_text_readers_refuse_text_that_is_not_utf8_and_name_the_offset(
    tmp_path: Path, reader: Any, split: Any, kind: str
) -> None:
    content, message = REFUSED[kind]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt.*{message}"):
        reader(tmp_path / "a.txt", split)


@pytest.mark.parametrize("reader", [from_text, from_files])
@pytest.mark.parametrize("split", SPLITS)
def test_text_readers_accept_a_line_of_several_megabytes(
    tmp_path: Path, reader: Any, split: Any
) -> None:
    line = "abcdefg " * 600_000
    (tmp_path / "a.txt").write_text(line)
    assert reader(tmp_path / "a.txt", split) == [line]


@pytest.mark.parametrize("end", list(ENDS))
def test_json_lines_accept_every_kind_of_line_end(tmp_path: Path, end: str) -> None:
    for name in ("a", "v"):
        objects = [f'{{"text": "{name} {number}"}}' for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_bytes(("\ufeff" + ENDS[end].join(objects)).encode())
    documents = read_json_lines([str(tmp_path / "a.jsonl")], validation=[str(tmp_path / "v.jsonl")])
    assert documents.train["text"] == [f"a {number}" for number in range(60)]
    assert documents.train["name"][59] == "a.jsonl line 60"
    assert from_files(tmp_path / "a.jsonl", "line") == [f"a {number}" for number in range(60)]


@pytest.mark.parametrize(
    ("split", "advice"),
    [("file", '"paragraph" or "line"'), ("paragraph", '"line"'), ("line", None)],
)
def test_error_for_a_single_document_suggests_splitting_by_smaller_units(
    tmp_path: Path, split: Any, advice: str | None
) -> None:
    (tmp_path / "a.txt").write_text("one line and no more")
    with pytest.raises(DataError, match=rf"1 document\(s\) by {split} cannot be divided") as raised:
        read_text_files([str(tmp_path / "a.txt")], split=split)
    assert "Name validation files" in str(raised.value)
    assert "held_out" not in str(raised.value).partition("Name")[2]  # it cannot divide one document
    assert ("split =" in str(raised.value)) == (advice is not None)
    if advice:
        assert f"(split = {advice})" in str(raised.value)
