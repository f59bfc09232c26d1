"""Text sources: no network request for local files, small sources, sources that stall."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ddiff.data import prefetch
from ddiff.data.documents import documents_from_texts
from ddiff.data.packing import pack
from ddiff.data.prefetch import Prefetcher
from ddiff.data.sources import open_hub_source
from ddiff.data.streaming import StreamedRows
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.data.tokenizer_workers import Chunk
from ddiff.errors import DataError

# One token per byte, and an end mark after each document.
BYTES = BytePairTokenizer.train(["text"], 257)

# Run in a separate process, because the libraries read their settings when they are imported.
READ_EVERYTHING = """
import socket, sys

def refuse(*arguments, **_):
    print("REQUEST", arguments, flush=True)
    raise OSError("no network")

socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse

from ddiff.clustering.files import load_model_embeddings
from ddiff.data.documents import read_text_files
from ddiff.data.jsonl import read_json_lines
from ddiff.data.sources import open_file_source, open_hub_source
from ddiff.data.tokenizer import PretrainedTokenizer
from ddiff_hf.backbone import load_model

counts = {}
for files in (["a.txt"], ["b.jsonl"], ["c.parquet"], ["d.txt.gz"]):
    counts[files[0]] = sum(len(chunk.texts) for chunk in open_file_source(files).chunks())
counts["hub"] = sum(len(chunk.texts) for chunk in open_hub_source("folder").chunks())
documents = read_text_files(["a.txt"], split="line", held_out=0.5)
counts["text"] = len(documents.train) + len(documents.validation)
documents = read_json_lines(["b.jsonl"], held_out=0.5)
counts["jsonl"] = len(documents.train) + len(documents.validation)
counts["tokenizer"] = PretrainedTokenizer.from_pretrained("tokenizer").num_tokens
counts["embeddings"] = len(load_model_embeddings("model", 8))
load_model("model"), load_model("model", pretrained=False)
print(counts)
"""


def test_reading_local_files_makes_no_network_request(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(9)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.txt.gz", "wt") as file:
        file.write("\n".join(texts))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(
        tmp_path / "tokenizer"
    )
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HF_HOME": str(tmp_path / "hf"), "DDIFF_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "REQUEST" not in ended.stdout
    read = dict.fromkeys(["a.txt", "b.jsonl", "c.parquet", "d.txt.gz", "hub", "text", "jsonl"], 9)
    assert ended.stdout.splitlines()[-1] == str(read | {"tokenizer": 2, "embeddings": 8})


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "", "file.txt"])
def test_open_hub_source_makes_no_request_for_a_missing_local_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("text")
    with pytest.raises(DataError, match="it is neither a folder nor a name on the hub"):
        open_hub_source(name)


class Source:
    """Source that counts the calls that open it."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.opened = 0

    def __call__(self, cursor: Any) -> Iterator[Chunk]:
        self.opened += 1
        for place in range(cursor or 0, len(self.texts), 2):
            yield Chunk(self.texts[place : place + 2], place + 2)


def streamed(source: Source, block: int = 4096, **settings: Any) -> StreamedRows:
    head = pack(documents_from_texts(source.texts), BYTES, 8)
    return StreamedRows(source, BYTES, 8, head=head, fingerprint="", block=block, **settings)


def test_source_smaller_than_a_block_is_read_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Source(["hello world", "abc", "de"])
    rows = streamed(source)
    found = rows[np.arange(3 * 4096)]
    assert source.opened == 1
    text = np.concatenate([[*BYTES.encode([text])[0], 0] for text in source.texts])
    assert (found.ids.ravel() == np.resize(text, found.ids.size)).all()
    documents = np.repeat(np.arange(3), [12, 4, 3])
    passes = np.arange(-(-found.ids.size // 19))[:, None] * 3
    assert (found.document.ravel() == (documents + passes).ravel()[: found.ids.size]).all()
    assert "19 training tokens, fewer than a block of 4096 rows of length 8" in caplog.text


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 50])
def test_small_streamed_source_resumes_from_every_cursor(tmp_path: Path, block: int) -> None:
    """Blocks are smaller or larger than the source, and each block is also read by a new object."""
    texts = ["hello", "abc", "de", "fghijk", "l"]
    count = 20 * block
    whole = streamed(Source(texts), block, cursors=tmp_path / "c.jsonl")[np.arange(count)]
    for number in range(20):
        source = Source(texts)
        numbers = np.arange(number * block, (number + 1) * block)
        found = streamed(source, block, cursors=tmp_path / "c.jsonl")[numbers]
        assert (found.ids == whole.ids[numbers]).all()
        assert (found.document == whole.document[numbers]).all()
        assert source.opened <= 2 + 8 * block // 22


def test_reading_rows_from_a_one_token_source_takes_only_seconds() -> None:
    began = time.monotonic()
    rows = streamed(Source([""]), 65536)
    assert not rows[np.arange(200_000)].ids.any()
    assert time.monotonic() - began < 20


def test_streamed_rows_continue_if_the_cursor_file_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    rows = streamed(Source(["hello world"]), 4, cursors=tmp_path / "file" / "c.jsonl")
    assert len(rows[np.arange(40)].ids) == 40
    assert caplog.text.count("can no longer be written") == 1


class StalledSource:
    """Source that yields the text of three training steps and then blocks forever."""

    def __init__(self, batch_at: Any) -> None:
        self.batch_at = batch_at
        self.waited = threading.Event()
        self.released = threading.Event()

    def __call__(self, step: int, micro: int) -> Any:
        if step >= 3:
            self.waited.set()
            self.released.wait(60)
        return self.batch_at(step, micro)


def test_prefetcher_reports_a_stalled_batch_and_stops_on_request(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefetch, "LINE_EVERY_SECONDS", 0.1)
    source = StalledSource(lambda step, micro: step)
    began = time.monotonic()
    with Prefetcher(source, 2) as ahead:
        assert [ahead(step, 0) for step in range(3)] == [0, 1, 2]
        assert ahead.fetch(3, 0, lambda: time.monotonic() > began + 0.5) is None
    assert time.monotonic() - began < 10  # without waiting for the thread that still reads
    source.released.set()
    assert "waiting for the data of step 4: " in capfd.readouterr().err


def test_prefetcher_raises_a_timeout_error_of_the_source_immediately() -> None:
    def batch_at(step: int, micro: int) -> int:
        raise TimeoutError("of the source")

    with Prefetcher(batch_at, 2) as ahead, pytest.raises(TimeoutError, match="of the source"):
        ahead(0, 0)


RUN_THAT_WAITS = """
import sys, threading, time
import ddiff.data.prefetch as prefetch
from ddiff.data.streaming import StreamedRows

prefetch.LINE_EVERY_SECONDS = 0.3
read = StreamedRows._next_block

def slowly(rows):
    if rows.state()["block"] >= int(sys.argv[1]):
        while True:
            time.sleep(1)
    return read(rows)

StreamedRows._next_block = slowly
from ddiff.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("number", "blocks"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_first_signal_ends_a_run_that_waits_for_data(
    tmp_path: Path, number: int, blocks: int
) -> None:
    """A run stopped before its first step saves nothing; later, the finished steps are saved."""
    (tmp_path / "one.txt").write_text("hello world\n" * 3)
    (tmp_path / "two.txt").write_text("hello\nworld\n")
    settings = [
        'data={kind="files", files=["one.txt"], validation=["two.txt"], length=8, '
        "streaming=true, block=8}",
        'tokenizer={kind="bpe", size=257}',
        'denoiser={kind="dit", width=16, layers=1, heads=1, time=false, head="tokens"}',
        'train={steps=9, batch=8, warmup=1, optimizer="adamw"}',
        "name=t",
    ]
    command = [sys.executable, "-c", RUN_THAT_WAITS, str(blocks), "run", "mdlm_small"]
    process = subprocess.Popen(
        [*command, *(f"--set={setting}" for setting in settings)],
        cwd=tmp_path,
        env={**os.environ, "DDIFF_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "waiting for the data" in line:
            break
    process.send_signal(number)
    began = time.monotonic()
    lines += process.stderr.readlines()
    assert process.wait(30) == 128 + number, lines
    assert time.monotonic() - began < 15
    output = "".join(lines)
    assert "Traceback" not in output
    assert (
        "Stopped before the first step" if not blocks else "Stopped at step 2 of 9, saved"
    ) in output
    saved = tmp_path / "runs" / "t" / "checkpoints"
    assert [place.name for place in saved.glob("*")] == (["step_00000002"] if blocks else [])
