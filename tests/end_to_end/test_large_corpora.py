"""A run on shards of a large corpus is the run on the same documents held in memory, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import CORPUS, RECIPE

import ddiff

BRIEF = ["train.steps=3", "sample.count=1", 'train.optimizer="adamw"']


def test_shards_train_and_evaluate_as_documents_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    Path("corpus.txt").write_text(CORPUS)
    Path("small.toml").write_text(RECIPE)
    pq.write_table(pa.table({"text": CORPUS.splitlines()}), "corpus.parquet")
    files = ['data.kind="files"', 'data.files=["corpus.parquet"]', "data.held_out=0.2"]
    ddiff.run("small.toml", settings=['run_dir="text"', *BRIEF])
    large = ddiff.run("small.toml", settings=['run_dir="files"', *files, *BRIEF])
    large.documents.write_shards(large.tokenizer, tmp_path / "made")
    made = ['data.kind="shards"', 'data.path="made"', 'tokenizer.kind="saved"', 'tokenizer.path="made/tokenizer.json"']
    ddiff.run("small.toml", settings=['run_dir="shards"', *made, *BRIEF])
    readings = [json.loads(Path(name, "evaluation.json").read_text()) for name in ("text", "files", "shards")]
    assert readings[0]["tokens"] > 50
    assert readings[0]["bits_per_byte"] > 0
    assert readings[1] == readings[0]
    assert readings[2] == readings[0]
    assert ddiff.load("shards").evaluate()[0].nelbo_nats_per_token == readings[0]["nelbo_nats_per_token"]
