"""Runs on shards and on streams of a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import read_evaluation
from small import CORPUS, RECIPE

import ddiff
from ddiff.cli import main

FILES = ['data.kind="files"', 'data.files=["corpus.parquet"]', "data.held_out=0.2"]
BRIEF = ["train.steps=3", "sample.count=1", 'train.optimizer="adamw"']


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    Path("corpus.txt").write_text(CORPUS)
    Path("small.toml").write_text(RECIPE)
    pq.write_table(pa.table({"text": CORPUS.splitlines()}), "corpus.parquet")


def test_run_on_shards_is_bitwise_equal_to_run_on_documents() -> None:
    ddiff.run("small.toml", settings=['run_dir="text"', *BRIEF])
    ddiff.run("small.toml", settings=['run_dir="files"', *FILES, *BRIEF])
    command("data", "small.toml", "--out", "made", *(f"--set={setting}" for setting in FILES))
    made = [
        'data.kind="shards"',
        'data.path="made"',
        'tokenizer.kind="saved"',
        'tokenizer.path="made/tokenizer.json"',
    ]
    ddiff.run("small.toml", settings=['run_dir="shards"', *made, *BRIEF])
    readings = [read_evaluation(Path(name)) for name in ("text", "files", "shards")]
    for reading in readings:
        del reading["components"]  # they name the data set and the tokenizer, which differ
    assert readings[0]["tokens"] > 50
    assert readings[0]["bits_per_byte"] > 0
    assert readings[1] == readings[0]
    # the rule by which bytes are counted differs: shards have no text
    sizes = [reading.pop("bytes") for reading in readings]
    assert sizes[2]["number"] == sizes[0]["number"]
    assert "shards" in sizes[2]["counted"]
    assert readings[2] == readings[0]
    figures = ddiff.evaluate_generation(ddiff.load("shards")).samples
    assert figures.known_words is None  # the words of held-out text are unknown
    assert (
        ddiff.load("shards").evaluate()[0].nelbo_nats_per_token
        == readings[0]["nelbo_nats_per_token"]
    )


def test_resumed_run_on_a_stream_equals_the_uninterrupted_run_bitwise() -> None:
    """Each step reads a block of four rows, so the second call resumes within the text."""
    stream = [
        *FILES,
        "data.streaming=true",
        "data.head=20",
        "data.block=4",
        "train.checkpoint_every=3",
    ]
    stream += ['train.schedule="constant"', "train.log_every=1", *BRIEF[1:]]
    for name, all_steps in (("straight", [6]), ("stopped", [3, 6])):
        for steps in all_steps:
            ddiff.run("small.toml", settings=[f'run_dir="{name}"', *stream, f"train.steps={steps}"])
    losses = [
        [
            json.loads(line)["train_loss"]
            for line in Path(name, "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "stopped")
    ]
    assert len(losses[0]) == 6
    assert losses[1] == losses[0]
    assert read_evaluation(Path("straight")) == read_evaluation(Path("stopped"))


def test_data_command_prints_sizes_and_verifies_shards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [f"--set={setting}" for setting in FILES]
    command("data", "small.toml", *settings)
    first = capsys.readouterr().out
    assert "rows of 8" in first
    assert "tokens/s" in first
    command("data", "small.toml", *settings, "--out", "memory://there")
    second = capsys.readouterr().out
    assert second.splitlines()[:3] == first.splitlines()[:3]
    assert "the checksums of all files are correct" in second
    assert 'path = "memory://there"' in second
    (shard,) = Path("cache").glob("shards/*/train_00000.tokens.npy")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit) as ended:
        main(["data", "small.toml", *settings])
    assert ended.value.code == 2
    assert "train_00000.tokens.npy is damaged" in capsys.readouterr().err
    command("data", "small.toml", "--out", "copy")  # documents in memory are written as shards too
    assert Path("copy", "manifest.json").is_file()
    with pytest.raises(SystemExit) as ended:
        main(["data", "small.toml", "--set=data.held_out=0.5", "--out", "copy"])
    assert ended.value.code == 2
    assert "holds other shards" in capsys.readouterr().err
