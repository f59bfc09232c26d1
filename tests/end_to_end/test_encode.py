"""`ddiff encode`: the command, kills of its processes, and mistakes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command, is_refusal
from small import CORPUS, RECIPE

import ddiff as package
from ddiff.recipe.resolve import parse_recipe

ENCODER = '\n[encoder]\nkind = "cooccurrence"\ndim = 8\n'
SLOW = '\n[encoder]\nkind = "slow"\n'


@pytest.fixture(autouse=True)
def _recipe(folder: Path) -> None:
    listed = RECIPE.replace('"dit"]', '"dit", "encoders"]')
    Path("small.toml").write_text(listed + ENCODER)


def read_files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def test_encode_writes_one_vector_per_document_next_to_the_run(ddiff: Command) -> None:
    done = ddiff("encode", "small.toml")
    assert done.code == 0
    assert "texts/s" in done.out
    vectors = package.EncodedVectors.open("runs/small-vectors", dim=8)
    documents = package.read_text_files(["corpus.txt"], split="line", held_out=0.2)
    sizes = (len(documents.train), len(documents.validation))
    assert (vectors.train.num_documents, vectors.validation.num_documents) == sizes
    assert sum(sizes) == len(CORPUS.splitlines())
    assert vectors.train.read(range(sizes[0]))[1].all()
    assert "already" in ddiff("encode", "small.toml").out


def test_encode_gives_the_same_files_for_documents_and_a_corpus_on_disk(ddiff: Command) -> None:
    assert ddiff("encode", "small.toml", "--out", "text").code == 0
    files = ['--set=data.kind="files"', '--set=data.files=["corpus.txt"]', "--set=data.split=line"]
    files.append("--set=data.held_out=0.2")
    done = ddiff("encode", "small.toml", "--out", "files", *files)
    assert done.code == 0, done.err
    for part in ("train", "validation"):
        found = [package.EncodedVectors.open(name) for name in ("text", "files")]
        first, second = (getattr(vectors, part) for vectors in found)
        assert np.array_equal(first.keys(), second.keys())
        numbers = range(first.num_documents)
        assert np.array_equal(first.read(numbers)[0], second.read(numbers)[0])


def test_recipe_without_encoder_is_resolved_as_before() -> None:
    plain = parse_recipe(RECIPE)
    assert plain.encoder is None
    assert "encoder" not in plain.to_dict()
    assert "encoder" not in plain.to_toml()


SLOW_ENCODER = """
import time

import numpy as np

from ddiff import hookimpl


class Slow:
    dim = 2
    fingerprint = "slow"

    @classmethod
    def build(cls, config):
        return cls()

    def encode(self, texts):
        time.sleep(0.1 * len(texts))
        return np.array([[len(text), sum(text.encode())] for text in texts], np.float32)


@hookimpl
def ddiff_register(registry):
    registry.add("encoder", "slow", "slow_encoder:Slow")
"""


@pytest.mark.slow
def test_killed_processes_of_the_command_lose_and_repeat_nothing(
    ddiff: Command, distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the command while it writes shards, with one, two and three processes."""
    site = distribution(
        "slow-dist", "1.0", {"slow": "slow_encoder"}, {"slow_encoder": SLOW_ENCODER}
    )
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    text = Path("small.toml").read_text()
    Path("small.toml").write_text(text.replace('"encoders"]', '"slow"]').replace(ENCODER, SLOW))
    assert ddiff("encode", "small.toml", "--out", "unkilled", "--shard-size=1").code == 0
    folder = Path("killed")
    written: dict[str, int] = {}  # modification time of each shard when it was first seen
    draw = random.Random(5)
    for processes in (1, 2, 3):
        arguments = ["encode", "small.toml", "--out", "killed", "--shard-size=1"]
        command = subprocess.Popen(
            [sys.executable, "-m", "ddiff", *arguments, f"--processes={processes}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(folder.glob("*.safetensors"))) <= len(written):
            assert command.poll() is None, "the job finished before it was killed"
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.2))
        command.kill()  # the workers end with the launcher
        command.wait()
        for path in folder.glob("*.safetensors"):
            written.setdefault(path.name, path.stat().st_mtime_ns)
    assert not (folder / "manifest.json").exists()
    assert ddiff("encode", "small.toml", "--out", "killed", "--shard-size=1").code == 0
    assert read_files("killed") == read_files("unkilled")
    for name, modified in written.items():
        assert (folder / name).stat().st_mtime_ns == modified  # no shard was encoded twice


# ---------------------------------------------------------------------- mistakes


def test_encode_refuses_a_recipe_without_encoder(ddiff: Command) -> None:
    Path("plain.toml").write_text(RECIPE)
    assert is_refusal(ddiff("encode", "plain.toml"), "plain.toml", "[encoder]", "cooccurrence")
    assert not Path("runs").exists()


def test_encode_refuses_unknown_encoder_and_key(ddiff: Command) -> None:
    refused = ddiff("encode", "small.toml", "--set", "encoder.kind=cooccurence")
    assert is_refusal(refused, 'Did you mean "cooccurrence"?')
    refused = ddiff("encode", "small.toml", "--set", "encoder.width=8")
    assert is_refusal(refused, "encoder", "width", "dim")


def test_encode_refuses_a_folder_of_another_encoder_or_of_other_data(ddiff: Command) -> None:
    assert ddiff("encode", "small.toml").code == 0
    before = read_files("runs/small-vectors")
    refused = ddiff("encode", "small.toml", "--set", "encoder.dim=7")
    assert is_refusal(refused, "encoder: was", "'dim': 8", "'dim': 7", "--out")
    Path("corpus.txt").write_text(f"{CORPUS}\none more line")
    assert is_refusal(ddiff("encode", "small.toml"), "documents: was")
    assert read_files("runs/small-vectors") == before


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("memory://vectors", "must be on this machine"),
        ("corpus.txt", "is a file"),
        (".", "corpus.txt"),
    ],
)
def test_encode_refuses_unsuitable_output_folders(ddiff: Command, out: str, expected: str) -> None:
    assert is_refusal(ddiff("encode", "small.toml", "--out", out), expected)


def test_encode_refuses_streams_and_token_shards(ddiff: Command) -> None:
    files = ['--set=data.kind="files"', '--set=data.files=["corpus.txt"]']
    refused = ddiff("encode", "small.toml", *files, "--set=data.streaming=true")
    assert is_refusal(refused, "[data]", "streaming = false")
    assert ddiff("data", "small.toml", "--out", "tokens").code == 0
    shards = ['--set=data={kind="shards", path="tokens", length=8}']
    refused = ddiff("encode", "small.toml", *shards)
    assert is_refusal(refused, "[data]", "no text")
