"""Compressed files are read; errors for damaged and misnamed files give the file and cause."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddiff.data.cache import Cache
from ddiff.data.corpus import SourceCorpus
from ddiff.data.documents import read_text_files
from ddiff.data.jsonl import read_json_lines
from ddiff.data.sources import open_file_source
from ddiff.data.symbol_rows import read_symbol_rows
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import ArgumentError, DataError

LINES = [
    f"line {number} of words that do not repeat: {number * 7919 % 1009}" for number in range(3000)
]
PLAIN = "\n".join(LINES).encode()
JSON = "\n".join(f'{{"text": "{line}"}}' for line in LINES).encode()


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def pack(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}
NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}


def read(*paths: Path, **options: Any) -> list[str]:
    return [
        text
        for chunk in open_file_source([str(path) for path in paths], **options).chunks()
        for text in chunk.texts
    ]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", list(PACKERS))
@pytest.mark.parametrize("content", [PLAIN, JSON])
def test_file_source_decompresses_every_format(tmp_path: Path, ending: str, content: bytes) -> None:
    inner = ".txt" if content is PLAIN else ".jsonl"
    pack = PACKERS[ending]
    whole = write(tmp_path / f"a{inner}{ending}", pack(content))
    assert read(whole) == LINES
    half = len(content) // 2 if content is PLAIN else content.index(b"\n", len(content) // 2) + 1
    concatenated = write(
        tmp_path / f"b{inner}{ending.upper()}", pack(content[:half]) + pack(content[half:])
    )
    assert read(concatenated) == LINES


@pytest.mark.parametrize("ending", list(PACKERS))
@pytest.mark.parametrize("kept", [0, 1, 3, 12, 0.5, -1, -9])
def test_file_source_raises_an_error_that_names_a_truncated_file(
    tmp_path: Path, ending: str, kept: float
) -> None:
    packed = PACKERS[ending](PLAIN)
    size = (
        int(len(packed) * kept)
        if isinstance(kept, float)
        else kept
        if kept >= 0
        else len(packed) + int(kept)
    )
    for number in range(3):
        write(tmp_path / f"part-{number}.txt{ending}", packed)
    write(tmp_path / f"part-1.txt{ending}", packed[:size])
    with pytest.raises(
        DataError, match=r"part-1\.txt\S* (is truncated|has the ending of)"
    ) as raised:
        read(tmp_path / f"*{ending}")
    assert "part-0" not in str(raised.value)


@pytest.mark.parametrize("ending", list(PACKERS))
def test_file_source_raises_an_error_that_names_a_damaged_file(tmp_path: Path, ending: str) -> None:
    packed = bytearray(PACKERS[ending](PLAIN))
    middle = len(packed) // 2
    packed[middle : middle + 40] = b"\xff" * 40
    with pytest.raises(DataError, match=r"a\.txt\S* (is damaged|is truncated|is not UTF-8)"):
        read(write(tmp_path / f"a.txt{ending}", bytes(packed)))


@pytest.mark.parametrize("ending", list(PACKERS))
def test_file_source_refuses_plain_text_with_a_compressed_ending(
    tmp_path: Path, ending: str
) -> None:
    with pytest.raises(
        DataError,
        match=rf"a\.txt\{ending} has the ending of a {NAMES[ending]} file, "
        "but it begins with b'line",
    ):
        read(write(tmp_path / f"a.txt{ending}", PLAIN))
    with pytest.raises(DataError, match="but it is empty"):
        read(write(tmp_path / f"empty.txt{ending}", b""))


@pytest.mark.parametrize("ending", list(PACKERS))
def test_file_source_refuses_compressed_files_without_matching_ending(
    tmp_path: Path, ending: str
) -> None:
    packed = PACKERS[ending](PLAIN)
    with pytest.raises(
        DataError,
        match=rf"a\.txt is not plain text: .* those of a {NAMES[ending]} file.*\{ending}",
    ):
        read(write(tmp_path / "a.txt", packed))
    other = ".xz" if ending == ".gz" else ".gz"
    with pytest.raises(DataError, match=rf"which is {NAMES[ending]}"):
        read(write(tmp_path / f"a.txt{other}", packed))


PLAIN_READERS: dict[str, Callable[[str], Any]] = {
    "text": lambda path: read_text_files([path], split="line"),
    "jsonl": lambda path: read_json_lines([path]),
    "symbols": lambda path: read_symbol_rows([path], length=8),
}


@pytest.mark.parametrize("kind", list(PLAIN_READERS))
@pytest.mark.parametrize("ending", list(PACKERS))
@pytest.mark.parametrize("named", [True, False])
def test_text_reader_error_suggests_data_kind_files_for_compressed_files(
    tmp_path: Path, kind: str, ending: str, named: bool
) -> None:
    path = write(tmp_path / (f"x.jsonl{ending}" if named else "x.jsonl"), PACKERS[ending](JSON))
    with pytest.raises(
        DataError, match=rf'those of a {NAMES[ending]} file.*Decompress.*kind = "files"'
    ):
        PLAIN_READERS[kind](str(path))


@pytest.mark.parametrize("kind", list(PLAIN_READERS))
def test_text_readers_raise_an_error_that_names_the_binary_format(
    tmp_path: Path, kind: str
) -> None:
    pq.write_table(pa.table({"text": LINES}), tmp_path / "a.txt")
    with pytest.raises(DataError, match="first bytes are those of a parquet file"):
        PLAIN_READERS[kind](str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="first bytes are those of a zip file"):
        PLAIN_READERS[kind](str(write(tmp_path / "b.txt", b"PK\x03\x04" + b"x" * 40)))
    with pytest.raises(
        DataError, match=r"a\.txt is not plain text: its first bytes are those of a parquet file"
    ):
        read(tmp_path / "a.txt")


def test_text_that_begins_like_a_compressed_file_is_read_as_text(tmp_path: Path) -> None:
    for number, line in enumerate(["BZh9 is how bzip2 begins", "PK", "P", "B", "%PDF"]):
        assert read(write(tmp_path / f"{number}.txt", line.encode())) == [line]


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


TEXT = pa.string()


def test_file_source_skips_parquet_files_without_text(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=pa.array([], TEXT))
    parquet(tmp_path / "b.parquet", text=LINES[:20])
    parquet(tmp_path / "c.parquet", text=pa.array([], TEXT))
    parquet(tmp_path / "d.parquet", text=pa.array([None, "", " "], TEXT))
    parquet(tmp_path / "e.parquet", text=LINES[20:30])
    assert read(tmp_path / "*.parquet") == LINES[:30]
    corpus = SourceCorpus(open_file_source([str(tmp_path / "[acd].parquet")]), held_out=0.5)
    with pytest.raises(DataError, match="no token"):
        corpus.shards(BytePairTokenizer.train(["a"], 257), Cache(tmp_path / "cache"))


def test_file_source_accepts_parquet_files_with_different_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=LINES[:9], url=["u"] * 9)
    parquet(tmp_path / "b.parquet", n=list(range(9)), text=LINES[9:18])
    parquet(
        tmp_path / "c.parquet",
        url=[1.5] * 9,
        text=pa.array(LINES[18:27], pa.large_string()),
        more=[[1]] * 9,
    )
    parquet(tmp_path / "d.parquet", text=pa.array(LINES[27:30]).dictionary_encode())
    assert read(tmp_path / "*.parquet") == LINES[:30]


def not_utf8() -> pa.Array:
    """Return an Arrow array of strings of which one is not valid UTF-8."""
    return pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")
    )


UNEQUAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such column": (lambda path: parquet(path, body=LINES[:9]), 'no column "text"; it has'),
    "a column of bytes": (
        lambda path: parquet(path, text=[b"a"]),
        r"row 1: the column .* holds b'a' \(bytes\)",
    ),
    "a column of numbers": (
        lambda path: parquet(path, text=[None, 1]),
        r"row 2: .* holds 1 \(int\)",
    ),
    "a column of lists": (lambda path: parquet(path, text=[["a"]]), r"row 1: .*\(list\)"),
    "NUL": (
        lambda path: parquet(path, text=["ok", "a\0b"]),
        "row 2 is not plain text: it holds the NUL",
    ),
    "not UTF-8": (
        lambda path: parquet(path, text=not_utf8()),
        "cannot be read: UnicodeDecodeError",
    ),
    "no bytes": (lambda path: write(path, b""), "cannot be read"),
    "cut off": (
        lambda path: write(path, parquet(path, text=LINES).read_bytes()[:-50]),
        "cannot be read",
    ),
    "text": (lambda path: write(path, PLAIN), "cannot be read"),
    "packed": (lambda path: write(path, gzip.compress(PLAIN)), "cannot be read"),
}


@pytest.mark.parametrize("kind", list(UNEQUAL))
def test_file_source_raises_an_error_that_names_an_unusable_parquet_file(
    tmp_path: Path, kind: str
) -> None:
    write_part, message = UNEQUAL[kind]
    parquet(tmp_path / "part-0.parquet", text=LINES[:9])
    parquet(tmp_path / "part-2.parquet", text=LINES[:9])
    write_part(tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match=rf"part-1\.parquet.*{message}") as raised:
        read(tmp_path / "*.parquet")
    assert "part-2" not in str(raised.value)


def test_file_source_refuses_a_compressed_parquet_file(tmp_path: Path) -> None:
    packed = gzip.compress(parquet(tmp_path / "a.parquet", text=LINES).read_bytes())
    with pytest.raises(DataError, match="Decompress the file"):
        read(write(tmp_path / "a.parquet.gz", packed))


@pytest.mark.parametrize("form", ["parquet", "json", "text"])
def test_file_source_resumes_across_empty_and_compressed_files(tmp_path: Path, form: str) -> None:
    """Cursors count blank records; some of the files are empty or compressed."""
    if form == "parquet":
        parquet(tmp_path / "a.parquet", text=LINES[:90])
        parquet(tmp_path / "b.parquet", text=pa.array([None], TEXT))
        parquet(tmp_path / "c.parquet", text=LINES[90:300])
    elif form == "json":
        write(tmp_path / "a.jsonl.gz", gzip.compress(JSON[: JSON.index(b'{"text": "line 200 ')]))
        write(tmp_path / "b.jsonl", b"\n\n")
        write(tmp_path / "c.json", b'[{"text": "one"},\n {"text": "array"}]')
    else:
        write(tmp_path / "a.txt.xz", lzma.compress("\n\n".join(LINES[:200]).encode()))
        write(tmp_path / "b.txt", b"\n\n")
        write(tmp_path / "c.txt", b"\nlast")
    source = open_file_source([str(tmp_path / "*")])
    whole = [text for chunk in source.chunks() for text in chunk.texts]
    assert len(whole) >= 200
    before: list[str] = []
    for chunk in source.chunks():
        before += chunk.texts
        assert (
            before + [text for later in source.chunks(chunk.cursor) for text in later.texts]
            == whole
        )


def test_file_source_refuses_an_unknown_ending_without_format(tmp_path: Path) -> None:
    for name in ("a.csv.gz", "a.zip", "a"):
        with pytest.raises(ArgumentError, match="format ="):
            read(write(tmp_path / name, PLAIN))


def test_parquet_reader_does_not_read_other_columns(tmp_path: Path) -> None:
    table = pa.table(
        {"junk": [f"{number * 7919}" * 5 for number in range(900)], "text": LINES[:900]}
    )
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).data_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[start : start + 200] = b"\xff" * 200
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(OSError):
        pq.read_table(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == LINES[:900]
