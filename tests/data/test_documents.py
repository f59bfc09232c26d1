"""Documents are files, paragraphs or lines; a hash of the text selects the held-out documents."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from datasets import Dataset

from ddiff.data.cache import Cache
from ddiff.data.documents import (
    Documents,
    documents_from_texts,
    fingerprint_texts,
    load_bundled_novels,
    read_text_files,
)
from ddiff.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def novels() -> Documents:
    return load_bundled_novels()


def write(folder: Path, **contents: str) -> list[str]:
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return [str(folder / f"{name}.txt") for name in contents]


def test_bundled_novels_are_split_by_chapter_and_one_novel_is_held_out(novels: Documents) -> None:
    assert (len(novels.train), len(novels.validation)) == (55 + 48 + 31 + 61 + 50, 24)
    assert {name.rsplit(" ", 1)[0] for name in novels.validation["name"]} == {"persuasion"}
    assert "persuasion" not in " ".join(novels.train["name"])
    assert all(
        text.splitlines()[0].lower().startswith("chapter") for text in novels.validation["text"][1:]
    )


def test_bundled_novels_contain_every_word_after_the_chapter_split(novels: Documents) -> None:
    # Numbers of words in the README of the novels, including headings.
    words = {}
    for part in (novels.train, novels.validation):
        for row in part:
            title = row["name"].rsplit(" ", 1)[0]
            words[title] = words.get(title, 0) + len(row["text"].split())
    assert words == {
        "emma": 157416,
        "mansfield_park": 159513,
        "northanger_abbey": 77055,
        "persuasion": 83270,
        "pride_and_prejudice": 121534,
        "sense_and_sensibility": 118529,
    }


def test_bundled_novels_keep_volume_headings_with_the_first_chapter(novels: Documents) -> None:
    emma = dict(zip(novels.train["name"], novels.train["text"]))
    assert emma["emma 19"].startswith("VOLUME II\n\nCHAPTER I\n\n")
    assert "VOLUME" not in emma["emma 18"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n", "four"]),
        ("paragraph", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_read_text_files_splits_by_file_paragraph_or_line(
    tmp_path: Path, split: str, expected: list[str]
) -> None:
    write(tmp_path, a="one\ntwo\n\nthree\n", b="four", v="held out")
    documents = read_text_files(
        [str(tmp_path / "[ab].txt")], validation=[str(tmp_path / "v.txt")], split=split
    )  # type: ignore[arg-type]
    assert documents.train["text"] == expected
    assert documents.validation["text"] == ["held out"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_read_text_files_accepts_fsspec_paths(tmp_path: Path, scheme: str) -> None:
    root = f"memory://documents{tmp_path}" if scheme == "memory" else f"file://{tmp_path}"
    for name in ("a", "b", "v"):
        with fsspec.open(f"{root}/{name}.txt", "w") as file:
            file.write(f"text {name}")
    documents = read_text_files([f"{root}/[ab].txt"], validation=[f"{root}/v.txt"])
    assert documents.train["text"] == ["text a", "text b"]
    assert documents.validation["text"] == ["text v"]


def test_held_out_documents_are_chosen_only_by_their_text(tmp_path: Path) -> None:
    lines = [f"line number {i}" for i in range(400)]
    whole = read_text_files(write(tmp_path, a="\n".join(lines)), split="line", held_out=0.2)
    # Expected 80 with standard deviation 8; the split is deterministic, and the limits are 4.5
    # deviations away.
    assert 44 < len(whole.validation) < 116
    assert sorted([*whole.train["text"], *whole.validation["text"]]) == sorted(lines)
    fewer = read_text_files(
        write(tmp_path, b="\n".join(reversed(lines[:200] * 2))), split="line", held_out=0.2
    )
    assert set(fewer.validation["text"]) == set(whole.validation["text"]) & set(lines[:200])


def test_read_text_files_is_cached_by_content(tmp_path: Path) -> None:
    paths, cache = write(tmp_path, a="one\ntwo\nthree\nfour", v="v"), Cache(tmp_path / "cache")

    def train() -> Dataset:
        return read_text_files(paths[:1], validation=paths[1:], split="line", cache=cache).train

    def entries() -> int:
        return len(list((tmp_path / "cache" / "documents").iterdir()))

    first = train()
    assert train()["text"] == first["text"]
    assert entries() == 2
    assert first.cache_files  # memory-mapped, not held in memory
    write(tmp_path, a="one\ntwo\nthree\nfive")
    assert train()["text"] == ["one", "two", "three", "five"]
    assert entries() == 3


def test_fingerprint_texts_depends_on_texts_and_boundaries() -> None:
    fingerprints = {
        fingerprint_texts(documents_from_texts(texts))
        for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])
    }
    assert len(fingerprints) == 4
    assert fingerprint_texts(documents_from_texts(["ab", "c"], ["x", "y"])) in fingerprints


def test_read_text_files_drops_carriage_returns_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    documents = read_text_files(
        [str(tmp_path / "a.txt")], validation=write(tmp_path, v="held out"), split="line"
    )
    assert documents.train["text"] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "corpus is empty"),
        (b" \n\n \n", "corpus is empty"),
        (b"caf\xe9 au lait", "0xe9 at offset 3"),
        (b"nul\0here", "NUL character at character 3"),
    ],
)
def test_read_text_files_refuses_bytes_that_are_not_utf8_text(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError, match=message) as caught:
        read_text_files([str(tmp_path / "a.txt")], split="line", cache=cache)
    assert "a.txt" in str(caught.value)


def test_read_text_files_caches_nothing_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"nul\0here")
    with pytest.raises(DataError):
        read_text_files([str(tmp_path / "a.txt")], cache=Cache(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.*")) == []


@pytest.mark.parametrize("path", ["missing.txt", "missing/*.txt", "nosuchprotocol://a.txt"])
def test_read_text_files_raises_an_error_that_names_a_missing_file(
    tmp_path: Path, path: str
) -> None:
    with pytest.raises(DataError, match=r"missing|nosuchprotocol"):
        read_text_files([path if "://" in path else str(tmp_path / path)])


def test_read_text_files_refuses_a_corpus_too_small_to_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="paragraph"):
        read_text_files(write(tmp_path, a="one document"))
    with pytest.raises(ArgumentError, match="held_out"):
        read_text_files(write(tmp_path, a="one document"), held_out=1.0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": []}, "strings|empty"),
        ({"words": ["a"]}, 'column "text"'),
        ({"text": [1.0, float("nan")]}, "must hold strings"),
        ({"text": ["a", None]}, "missing values"),
    ],
)
def test_documents_refuse_columns_that_are_not_text(
    columns: dict[str, list[object]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Documents(Dataset.from_dict(columns), documents_from_texts(["a"]))


@pytest.mark.parametrize("content", [float("nan"), None, 3, "a\0b"])
def test_documents_from_texts_refuses_values_that_are_not_text(content: object) -> None:
    with pytest.raises(DataError, match="text 1"):
        documents_from_texts(["fine", content])  # type: ignore[list-item]
