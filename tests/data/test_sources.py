"""Hub data sets, files and existing shards give the same rows; errors name the cause."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import TOKENIZER, json_file, parquet_files, sentences
from ddiff_core.data import Files, Hub, Shards
from ddiff_core.tokenizers import BytePair, Saved

from ddiff.data.cache import Cache
from ddiff.data.condition_forms import Label
from ddiff.data.conditions import read_conditions
from ddiff.data.corpus import SourceCorpus, build_train_rows, build_validation_rows
from ddiff.data.documents import documents_from_texts, split_documents
from ddiff.data.packing import pack
from ddiff.data.sources import open_file_source, open_hub_source
from ddiff.errors import ArgumentError, DataError

TEXTS = sentences(200)


def read(source: Any, cursor: Any = None) -> list[str]:
    return [text for chunk in source.chunks(cursor) for text in chunk.texts]


def in_memory(name: str, content: bytes) -> str:
    with fsspec.open(f"memory://{name}", "wb") as file:
        file.write(content)
    return f"memory://{name}"


def test_file_source_reads_every_format_and_file_system(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    plain = "\n".join(TEXTS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    places = [
        parquet_files(tmp_path / "parquet", TEXTS),
        f"file://{parquet_files(tmp_path / 'more', TEXTS)}",
        str(tmp_path / "a.jsonl.gz"),
        in_memory("corpora/a.jsonl", lines),
        in_memory("corpora/a.txt", plain),
    ]
    for place in places:
        assert read(open_file_source([place])) == TEXTS, place


def test_file_source_reads_the_files_of_a_pattern_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        json_file(tmp_path / f"{name}.jsonl", [name])
    assert read(open_file_source([f"{tmp_path}/[bc].jsonl", f"{tmp_path}/a.jsonl"])) == [
        "b",
        "c",
        "a",
    ]


def test_file_source_splits_text_and_drops_blank_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \n\nthree")
    pieces = {
        split: read(open_file_source([str(tmp_path / "a.txt")], split=split))
        for split in ("line", "paragraph", "file")
    }
    assert pieces["line"] == ["one", "two", "three"]
    assert [piece.strip() for piece in pieces["paragraph"]] == ["one\ntwo", "three"]
    assert pieces["file"] == ["one\ntwo\n\n \n\nthree"]


def test_hub_source_reads_a_local_folder(tmp_path: Path) -> None:
    parquet_files(tmp_path / "set" / "data", TEXTS, column="body")
    assert read(open_hub_source(str(tmp_path / "set"), column="body")) == TEXTS


@pytest.mark.parametrize("made", ["parquet", "json"])
def test_file_source_continues_from_any_cursor_without_gap_or_repeat(
    tmp_path: Path, made: str
) -> None:
    """Cursors (JSON) point between files, into files, and into row groups of a parquet file."""
    texts = sentences(400)
    folder = tmp_path / "files"
    place = (
        parquet_files(folder, texts)
        if made == "parquet"
        else json_file(tmp_path / "a.jsonl", texts)
    )
    read_before: list[str] = []
    for chunk in open_file_source([place]).chunks():
        read_before += chunk.texts
        rest = read(open_file_source([place]), json.loads(json.dumps(chunk.cursor)))
        assert read_before + rest == texts


def corpora(tmp_path: Path) -> dict[str, Any]:
    """Build corpora of the same texts, by name: from files, and from a folder in hub layout."""
    (tmp_path / "set").mkdir(parents=True)
    json_file(tmp_path / "set" / "train.jsonl", TEXTS)
    files = Files.Config(files=(parquet_files(tmp_path / "p", TEXTS),), held_out=0.2, workers=2)
    hub = Hub.Config(name=str(tmp_path / "set"), held_out=0.2)
    return {
        "files": Files.build(files, length=8, seed=0, cache=None),
        "hub": Hub.build(hub, length=8, seed=0, cache=None),
    }


def test_sharded_corpora_give_the_same_rows_as_packing_in_memory(tmp_path: Path) -> None:
    direct = split_documents(documents_from_texts(TEXTS), 0.2, "")
    train, validation = (
        pack(direct.train, TOKENIZER, 16),
        pack(direct.validation, TOKENIZER, 16, separate=True),
    )
    cache = Cache(tmp_path / "cache")
    for corpus in corpora(tmp_path).values():
        for _ in range(2):
            assert build_train_rows(corpus, TOKENIZER, 16, cache).fingerprint == train.fingerprint
            assert (
                build_validation_rows(corpus, TOKENIZER, 16, cache).fingerprint
                == validation.fingerprint
            )
        assert list(corpus.train["text"]) == direct.train["text"][:]
        assert list(corpus.validation["text"]) == direct.validation["text"][:]


def test_source_corpus_reads_validation_from_its_validation_source(tmp_path: Path) -> None:
    source, other = (
        parquet_files(tmp_path / "t", TEXTS),
        json_file(tmp_path / "v.jsonl", ["held", "out"]),
    )
    corpus = SourceCorpus(open_file_source([source]), open_file_source([other]))
    cache = Cache(tmp_path / "cache")
    expected = pack(documents_from_texts(["held", "out"]), TOKENIZER, 16, separate=True)
    assert build_validation_rows(corpus, TOKENIZER, 16, cache).fingerprint == expected.fingerprint
    assert (
        build_train_rows(corpus, TOKENIZER, 16, cache).fingerprint
        == pack(documents_from_texts(TEXTS), TOKENIZER, 16).fingerprint
    )
    assert list(corpus.validation["text"]) == ["held", "out"]


def test_source_corpus_continues_from_any_cursor_without_gap_or_repeat(tmp_path: Path) -> None:
    corpus = SourceCorpus(
        open_file_source([parquet_files(tmp_path / "t", sentences(150))]),
        open_file_source([parquet_files(tmp_path / "v", TEXTS)]),
    )
    whole = [(chunk.part, text) for chunk in corpus.chunks() for text in chunk.texts]
    before: list[Any] = []
    for chunk in corpus.chunks():
        before += [(chunk.part, text) for text in chunk.texts]
        rest = [(later.part, text) for later in corpus.chunks(chunk.cursor) for text in later.texts]
        assert before + rest == whole


def test_shards_are_cached_by_source_and_not_by_length(tmp_path: Path) -> None:
    corpus, cache = corpora(tmp_path)["hub"], Cache(tmp_path / "cache")
    for length in (8, 16):
        build_train_rows(corpus, TOKENIZER, length, cache)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1
    json_file(tmp_path / "a.jsonl", TEXTS)
    files = [str(tmp_path / "a.jsonl")]
    build_train_rows(SourceCorpus(open_file_source(files), held_out=0.2), TOKENIZER, 8, cache)
    json_file(tmp_path / "a.jsonl", [*TEXTS, "one more"])
    build_train_rows(SourceCorpus(open_file_source(files), held_out=0.2), TOKENIZER, 8, cache)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 3


def test_sharded_corpus_reads_local_and_remote_shards(tmp_path: Path) -> None:
    corpus = corpora(tmp_path)["files"]
    made = corpus.write_shards(TOKENIZER, tmp_path / "shards")
    remote = "memory://bucket/shards"
    system, place = fsspec.url_to_fs(remote)
    system.put(f"{tmp_path}/shards/", place, recursive=True)
    for path in (str(tmp_path / "shards"), remote):
        cache = Cache(tmp_path / "cache")
        again = Shards.build(Shards.Config(path=path), length=8, seed=0, cache=cache)
        saved = Saved.build(
            Saved.Config(path=f"{path}/tokenizer.json"), documents=again, cache=cache
        )
        assert (
            build_train_rows(again, saved, 8, cache).fingerprint
            == build_train_rows(corpus, TOKENIZER, 8, cache).fingerprint
        )
        with pytest.raises(DataError, match='kind = "saved"'):
            BytePair.build(BytePair.Config(size=300), documents=again, cache=cache)
    assert made.folder == tmp_path / "shards"
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(DataError, match="not a folder of token shards"):
        Shards.build(Shards.Config(path=str(tmp_path / "shards")), length=8, seed=0, cache=None)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Shards.build(Shards.Config(path="memory://nowhere"), length=8, seed=0, cache=None)


def test_byte_pair_tokenizer_of_a_streamed_source_is_cached(tmp_path: Path) -> None:
    direct = split_documents(documents_from_texts(TEXTS), 0.2, "")
    expected = BytePair.build(BytePair.Config(size=270), documents=direct, cache=None)
    for _ in range(2):
        built = BytePair.build(
            BytePair.Config(size=270),
            documents=corpora_of(tmp_path),
            cache=Cache(tmp_path / "cache"),
        )
        assert built.fingerprint == expected.fingerprint
    assert len(list((tmp_path / "cache" / "byte_pairs").iterdir())) == 1


def corpora_of(tmp_path: Path) -> Any:
    if not (tmp_path / "set").exists():
        return corpora(tmp_path)["hub"]
    return Hub.build(
        Hub.Config(name=str(tmp_path / "set"), held_out=0.2), length=8, seed=0, cache=None
    )


def test_read_conditions_refuses_a_corpus_without_condition_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='kind that reads this column, such as "jsonl"'):
        read_conditions(corpora(tmp_path)["hub"].train, ["author"], {"author": Label(2)})


def faults(folder: Path) -> dict[str, Any]:
    """Return faulty sources by name: (function that opens the source, expected error message)."""
    folder.mkdir(parents=True, exist_ok=True)
    parquet = parquet_files(folder / "p", TEXTS[:9], column="body")
    lines = json_file(folder / "a.jsonl", TEXTS[:3])
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    (folder / "torn.jsonl").write_text('{"text": "ok"}\n{"text": \n')
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    (folder / "a.csv").write_text("text\na\n")
    return {
        "column": (
            lambda: open_file_source([parquet]),
            r'no column "text"; it has \[.body., .n.\]',
        ),
        "field": (
            lambda: open_file_source([lines], column="txt"),
            r'no column "txt".*Did you mean "text"',
        ),
        "number": (
            lambda: open_file_source([parquet], column="n"),
            r'column "n" must hold text; it holds 0 \(int\)',
        ),
        "latin": (
            lambda: open_file_source([str(folder / "latin.txt")]),
            r"latin\.txt is not UTF-8: byte 0xe9 at offset 3",
        ),
        "json": (
            lambda: open_file_source([str(folder / "latin.jsonl")]),
            r"latin\.jsonl is not UTF-8: byte 0xe9 at offset 28",
        ),
        "torn": (
            lambda: open_file_source([str(folder / "torn.jsonl")]),
            r"torn\.jsonl.*cannot be read",
        ),
        "parquet": (
            lambda: open_file_source([str(folder / "torn.parquet")]),
            r"torn\.parquet.*cannot be read",
        ),
        "missing": (lambda: open_file_source([str(folder / "none.parquet")]), "There is no file"),
        "hub": (
            lambda: open_hub_source(str(folder / "nowhere")),
            "cannot be read.*name the folder",
        ),
        "split": (
            lambda: open_hub_source(str(folder / "p"), split="dev", column="body"),
            "cannot be read",
        ),
    }


FAULTS = [
    "column",
    "field",
    "number",
    "latin",
    "json",
    "torn",
    "parquet",
    "missing",
    "hub",
    "split",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_text_source_raises_an_error_that_names_the_cause_of_a_failure(
    tmp_path: Path, fault: str
) -> None:
    open_source, message = faults(tmp_path)[fault]
    with pytest.raises(DataError, match=rf"(?s){message}"):
        read(open_source())


def test_file_source_refuses_unknown_or_mixed_file_endings(tmp_path: Path) -> None:
    faults(tmp_path)
    for names in (["a.csv"], ["a.jsonl", "latin.txt"]):
        with pytest.raises(ArgumentError, match="format ="):
            open_file_source([str(tmp_path / name) for name in names])
    assert read(open_file_source([str(tmp_path / "a.csv")], format="text")) == ["text", "a"]


def test_file_source_refuses_an_empty_list_of_patterns() -> None:
    with pytest.raises(ArgumentError, match="open_file_source: patterns must hold at least one"):
        open_file_source([])


def test_file_source_drops_missing_and_blank_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "", " \n", "b"]}), tmp_path / "a.parquet")
    assert read(open_file_source([str(tmp_path / "a.parquet")])) == ["a", "b"]


def test_source_corpus_refuses_a_train_or_validation_part_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    few = json_file(tmp_path / "few.jsonl", ["a"])
    cases = [
        ([str(tmp_path / "empty.txt")], "no token"),
        ([few], "has no text for the (training|validation) part"),
    ]
    for files, message in cases:
        with pytest.raises(DataError, match=message):
            build_train_rows(
                SourceCorpus(open_file_source(files), held_out=0.5),
                TOKENIZER,
                8,
                Cache(tmp_path / "cache"),
            )
    with pytest.raises(ArgumentError, match="held_out"):
        SourceCorpus(open_file_source([few]), held_out=0.0)


def test_corpora_of_different_sources_have_different_fingerprints(tmp_path: Path) -> None:
    parquet, lines = parquet_files(tmp_path / "p", TEXTS), json_file(tmp_path / "a.jsonl", TEXTS)
    made = [
        SourceCorpus(open_file_source([parquet]), held_out=0.2),
        SourceCorpus(open_file_source([parquet]), held_out=0.1),
        SourceCorpus(open_file_source([lines]), held_out=0.2),
        SourceCorpus(open_file_source([lines], column="n"), held_out=0.2),
        SourceCorpus(open_file_source([parquet]), open_file_source([lines])),
        SourceCorpus(open_hub_source("a/b"), held_out=0.2),
        SourceCorpus(open_hub_source("a/b", revision="c"), held_out=0.2),
        SourceCorpus(open_hub_source("a/b", split="x"), held_out=0.2),
    ]
    known = [part.fingerprint for corpus in made for part in (corpus.train, corpus.validation)]
    assert not [pair for pair in itertools.combinations(known, 2) if pair[0] == pair[1]]
