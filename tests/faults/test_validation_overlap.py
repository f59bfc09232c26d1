"""Validation text that also occurs in the training text is detected, by path or by content."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ddiff
from ddiff.data.cache import Cache
from ddiff.data.corpus import SourceCorpus, StreamedCorpus, check_repetitions, load_or_build_shards
from ddiff.data.documents import Documents, documents_from_texts, read_text_files
from ddiff.data.jsonl import read_json_lines
from ddiff.data.overlap import DocumentCount, check_overlap, document_hashes, find_overlap
from ddiff.data.shards import read_shards, write_shards
from ddiff.data.sources import open_file_source, open_hub_source
from ddiff.data.symbol_rows import read_symbol_rows
from ddiff.data.tokenizer import AlphabetTokenizer, BytePairTokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION, Chunk
from ddiff.distributed.single import SingleBackend
from ddiff.errors import DataError
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.dry_run import rehearse
from ddiff.runs.session import build_run
from ddiff.runs.tokenize import prepare_data

RNG = np.random.default_rng(0)
SENTENCE = "the cat sat on a mat and the dog ran to the old red house by the sea"
WORDS = SENTENCE.split()
LINES = [f"{number}: {' '.join(RNG.choice(WORDS, 9))}" for number in range(200)]
ROWS = ["".join(RNG.choice(list("ACGT"), 8)) for _ in range(200)]
ROWS = sorted(set(ROWS))
RECIPE = """
name = "t"
extends = "mdlm_small"
[data]
kind = "text"
files = ["corp/a.txt"]
split = "line"
length = 32
[tokenizer]
size = 270
[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
[train]
steps = 1
batch = 4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(kind: str, path: str, lines: list[str]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    if kind == "jsonl":
        Path(path).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": lines}), path)
    else:
        Path(path).write_text("\n".join(lines))


KINDS = {
    "text": (".txt", LINES, 'split = "line"'),
    "jsonl": (".jsonl", LINES, ""),
    "symbols": (".txt", ROWS, ""),
    "files of text": (".txt", LINES, 'split = "line"'),
    "files of JSON": (".jsonl", LINES, ""),
    "files of parquet": (".parquet", LINES, ""),
    "files, streamed": (".jsonl", LINES, "streaming = true"),
}


def recipe(kind: str, files: list[str], validation: list[str]) -> Any:
    symbols = kind == "symbols"
    tokenizer = 'kind = "alphabet"' if symbols else "size = 270"
    table = (
        f'[data]\nkind = "{kind.partition(" ")[0].strip(",")}"\nfiles = {json.dumps(files)}\n'
        f"validation = {json.dumps(validation)}\n{KINDS[kind][2]}\n"
        f"length = {8 if symbols else 32}\n"
        f"[tokenizer]\n{tokenizer}\n[denoiser]"
    )
    before, _, after = RECIPE.partition("[data]")
    return parse_recipe(before + table + after.partition("[denoiser]")[2], "t.toml", [])


def written(kind: str, **parts: list[str]) -> None:
    ending = KINDS[kind][0]
    form = {".jsonl": "jsonl", ".parquet": "parquet"}.get(ending, "text")
    for name, lines in parts.items():
        write(form, f"corp/{name}{ending}", lines)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("files", ["corp/*", "corp/a", "./corp/../corp/a"])
def test_dry_run_refuses_a_file_named_for_training_and_validation(kind: str, files: str) -> None:
    ending = KINDS[kind][0]
    Path("corp").mkdir()
    Path(f"corp/a{ending}").write_bytes(b"\xff no text of any kind, which reading would find")
    Path(f"corp/b{ending}").write_bytes(b"\xff")
    parsed = recipe(kind, [files + ending], [f"corp/a{ending}"])
    for refuse in (rehearse, lambda parsed: build_run(parsed, SingleBackend())):
        with pytest.raises(
            DataError, match=rf"\[data\].*corp/a\{ending} is named by validation and by files"
        ):
            refuse(parsed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_run_refuses_a_copy_of_the_training_text_as_validation(kind: str) -> None:
    lines = KINDS[kind][1]
    written(kind, a=lines, copy=lines)
    parsed = recipe(kind, [f"corp/a{KINDS[kind][0]}"], [f"corp/copy{KINDS[kind][0]}"])
    for refuse in (lambda parsed: build_run(parsed, SingleBackend()), prepare_data):
        with pytest.raises(
            DataError, match=rf"all {len(lines)} validation documents are in the training text"
        ):
            refuse(parsed)
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", list(KINDS))
def test_validation_documents_in_the_training_text_are_counted(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = KINDS[kind][1]
    written(kind, a=lines[:120], v=lines[80:160])
    parsed = recipe(kind, [f"corp/a{KINDS[kind][0]}"], [f"corp/v{KINDS[kind][0]}"])
    for _ in range(2):  # with new shards, and with cached ones
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_run(parsed, SingleBackend())
        assert [
            text
            for text in caplog.messages
            if "40 of the 80 documents for validation (50 %)" in text
        ]


@pytest.mark.parametrize("kind", list(KINDS))
def test_corpus_of_distinct_documents_gives_no_overlap_warning(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = KINDS[kind][1]
    written(kind, a=lines[:120], v=lines[120:])
    with caplog.at_level(logging.WARNING):
        build_run(
            recipe(kind, [f"corp/a{KINDS[kind][0]}"], [f"corp/v{KINDS[kind][0]}"]), SingleBackend()
        )
    assert not [text for text in caplog.messages if "documents" in text]


@pytest.mark.parametrize("held_out", [0.05, 0.5])
def test_documents_held_out_by_hash_do_not_occur_in_training(held_out: float) -> None:
    write("text", "a.txt", LINES * 3)
    parts = read_text_files(["a.txt"], split="line", held_out=held_out)
    found = load_or_build_shards(parts, BytePairTokenizer.train(LINES, 270), Cache()).overlap
    assert found["validation_in_train"] == [0, len(parts.validation)]


def test_overlapping_patterns_read_each_document_once() -> None:
    for number in range(3):
        write("jsonl", f"x{number}.jsonl", LINES[number * 50 : number * 50 + 50])
        write("text", f"x{number}.txt", LINES[number * 50 : number * 50 + 50])
    write("text", "v.txt", ["held out"])
    write("jsonl", "v.jsonl", ["held out"])
    texts = read_text_files(["x*.txt", "x1.txt", "./x2.txt"], split="line", validation=["v.txt"])
    objects = read_json_lines(["x*.jsonl", "x1.jsonl"], validation=["v.jsonl"])
    read = [
        text
        for chunk in open_file_source(["x*.jsonl", "x1.jsonl"]).chunks()
        for text in chunk.texts
    ]
    assert texts.train["text"] == objects.train["text"] == read == LINES[:150]


def test_repeated_documents_within_a_part_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    write("text", "corp/a.txt", LINES[:150])
    write("text", "corp/copy.txt", LINES[:50])
    write("text", "v.txt", LINES[150:] + LINES[150:170])
    with caplog.at_level(logging.WARNING):
        build_run(recipe("text", ["corp/*.txt"], ["v.txt"]), SingleBackend())
    output = "\n".join(caplog.messages)
    assert "50 of the 200 documents of the part train repeat an earlier document" in output
    assert "20 of the 70 documents of the part validation repeat an earlier document" in output


def test_source_corpus_refuses_one_hub_split_for_training_and_validation() -> None:
    with pytest.raises(DataError, match="is named for training and for validation"):
        SourceCorpus(open_hub_source("a/b", split="train"), open_hub_source("a/b", split="train"))
    SourceCorpus(open_hub_source("a/b", split="train"), open_hub_source("a/b", split="test"))


def test_shards_manifest_stores_the_overlap_counts() -> None:
    documents = Documents(documents_from_texts(LINES[:100]), documents_from_texts(LINES[50:150]))
    tokenizer = BytePairTokenizer.train(LINES, 270)
    made = load_or_build_shards(documents, tokenizer, Cache())
    again = ddiff.ShardedCorpus(str(made.folder))
    assert again.shards(tokenizer, Cache()).manifest["overlap"]["validation_in_train"] == [50, 100]
    manifest = json.loads((made.folder / "manifest.json").read_text())
    del manifest["overlap"]  # as in manifests of older versions
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_shards(made.folder).overlap == made.overlap


def test_stream_warns_once_of_validation_text_in_training_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    write("jsonl", "a.jsonl", LINES)
    write("jsonl", "v.jsonl", [LINES[150], "held out"])
    source = SourceCorpus(open_file_source(["a.jsonl"]), open_file_source(["v.jsonl"]))
    corpus = StreamedCorpus(source, head=20, block=4)
    tokenizer = BytePairTokenizer.train(LINES, 270)
    check_repetitions(
        corpus, corpus.shards(tokenizer, Cache())
    )  # the first 20 texts have no repetitions
    rows = corpus.train_rows(tokenizer, 16, Cache())
    with caplog.at_level(logging.WARNING):
        rows[np.arange(400)]
    output = [text for text in caplog.messages if "validation" in text]
    assert len(output) == 1
    assert LINES[150][:20] in output[0]


def test_repetitions_of_a_generated_source_give_no_overlap_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = ddiff.MarkovSource(4, peakedness=9.0).documents(rows=500, validation=5, length=4)
    made = load_or_build_shards(documents, AlphabetTokenizer("abcd"), Cache())
    with caplog.at_level(logging.WARNING):
        check_repetitions(documents, made)
    assert not caplog.messages


@pytest.mark.parametrize("seed", range(8))
def test_find_overlap_counts_equal_counts_with_python_sets(seed: int) -> None:
    """Some documents are empty, are permutations of each other, or have a common beginning."""
    rng = np.random.default_rng(seed)
    parts = {
        part: ["".join(rng.choice(list("ab"), rng.integers(0, 6))) for _ in range(150)]
        for part in (TRAIN, VALIDATION)
    }

    def chunks(_: Any) -> Any:
        for part, texts in parts.items():
            for start in range(0, 150, 7):
                yield Chunk(texts[start : start + 7], None, part)

    tokenizer = AlphabetTokenizer("ab")
    made = write_shards(Path(f"shards{seed}"), chunks, tokenizer, source={}, shard_tokens=60)
    train, validation = parts[TRAIN], parts[VALIDATION]
    assert len(made.records(TRAIN)) > 2
    assert made.overlap == {
        "validation_in_train": [sum(text in set(train) for text in validation), 150],
        "train_repeated": [150 - len(set(train)), 150],
        "validation_repeated": [150 - len(set(validation)), 150],
    }


def test_document_hashes_do_not_depend_on_the_number_of_tokens_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = Documents(documents_from_texts(LINES), documents_from_texts(["held out"]))
    (shard,) = (
        load_or_build_shards(documents, BytePairTokenizer.train(LINES, 270), Cache())
        .stream(TRAIN)
        .shards
    )
    whole = document_hashes(shard)
    assert len(set(whole.tolist())) == len(LINES)
    for size in (1, 7, 64):
        monkeypatch.setattr("ddiff.data.overlap._AT_ONCE", size)
        assert np.array_equal(document_hashes(shard), whole)


def test_find_overlap_of_empty_parts_is_zero() -> None:
    documents = Documents(documents_from_texts(LINES), documents_from_texts(["held out"]))
    made = load_or_build_shards(documents, BytePairTokenizer.train(LINES, 270), Cache())
    none = type(made.stream(TRAIN))([], made.stream(TRAIN).counts)
    assert find_overlap(none, none) == {
        "validation_in_train": [0, 0], "train_repeated": [0, 0], "validation_repeated": [0, 0]
    }  # fmt: skip
    check_overlap(find_overlap(none, none), "The corpus")
    assert DocumentCount(0, 0).share == 0.0


def test_read_symbol_rows_refuses_a_training_file_as_validation() -> None:
    write("text", "a.txt", ROWS)
    with pytest.raises(DataError, match="named by validation and by files"):
        read_symbol_rows(["a.txt"], length=8, validation=["a.txt"])
