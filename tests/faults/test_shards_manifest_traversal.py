"""Manifests cannot name files outside their folder; shards are verified by SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.data.cache import Cache
from ddiff.data.corpus import ShardedCorpus, SourceCorpus
from ddiff.data.shards import MANIFEST, Shards, read_shards, write_shards
from ddiff.data.sources import open_file_source
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.data.tokenizer_workers import Chunk
from ddiff.errors import CheckpointError, DataError

BYTES = BytePairTokenizer.train(["text"], 257)
TEXTS = [f"text number {number}" for number in range(40)]


@pytest.fixture
def made(tmp_path: Path) -> Shards:
    chunks = [Chunk(TEXTS[place : place + 5], place + 5, None) for place in range(0, 40, 5)]
    return write_shards(
        tmp_path / "made", lambda _: chunks, BYTES, source={}, held_out=0.3, shard_tokens=200
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def url(folder: Path) -> str:
    return f"file://{folder}"


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = [
    "../outside/train_00000",
    "{out}/owned",
    "{out}/train_00000",
    "train_00000/../../outside/owned",
    "..",
    ".",
    "",
    "train_00000\0",
    "train_00000.tokens.npy",
    "validation_00000",
    "train_0",
    3,
    None,
    ["train_00000"],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["local", "fetched"])
def test_manifest_with_shard_names_outside_the_folder_is_refused(
    made: Shards, cache: Cache, tmp_path: Path, name: Any, place: str
) -> None:
    """Manifests name existing shard files outside the folder; these files are not changed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for kind in ("tokens", "ends"):
        shutil.copy(made.folder / f"train_00000.{kind}.npy", outside / f"train_00000.{kind}.npy")
        (outside / f"owned.{kind}.npy").write_text("precious")
    named = name.format(out=outside) if isinstance(name, str) else name
    change(made.folder, lambda manifest: manifest["parts"]["train"][0].update(name=named))
    before = tree(outside)
    with pytest.raises(DataError, match=r"manifest\.json is not a valid manifest of token shards"):
        ShardedCorpus(str(made.folder) if place == "local" else url(made.folder), cache)
    assert tree(outside) == before
    assert not tree(tmp_path / "cache")


EDITS: dict[str, Callable[[Any], None]] = {
    "twice": lambda manifest: manifest["parts"]["train"].append(manifest["parts"]["train"][0]),
    "other part": lambda manifest: manifest["parts"].update(test=[]),
    "no part": lambda manifest: manifest["parts"].pop("validation"),
    "parts": lambda manifest: manifest.update(parts=[]),
    "list": lambda manifest: manifest["parts"].update(train={}),
    "record": lambda manifest: manifest["parts"]["train"].append("train_00009"),
    "more": lambda manifest: manifest["parts"]["train"][0].update(path="/etc"),
    "less": lambda manifest: manifest["parts"]["train"][0].pop("ends_sha256"),
    "negative": lambda manifest: manifest["parts"]["train"][0].update(tokens=-1),
    "fraction": lambda manifest: manifest["parts"]["train"][0].update(tokens=1.5),
    "text": lambda manifest: manifest["parts"]["train"][0].update(documents="9"),
    "sum": lambda manifest: manifest["parts"]["train"][0].update(tokens_sha256="abc"),
    "object": lambda manifest: manifest.update(dtype="object"),
    "float": lambda manifest: manifest.update(dtype="float64"),
    "tokenizer": lambda manifest: manifest.update(tokenizer=None),
    "num_tokens": lambda manifest: manifest["tokenizer"].update(num_tokens="many"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_read_shards_refuses_a_wrong_manifest(made: Shards, edit: str) -> None:
    change(made.folder, EDITS[edit])
    with pytest.raises(DataError, match="is not a valid manifest of token shards"):
        read_shards(made.folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b'{"format": [1]}']
)
@pytest.mark.parametrize("place", ["local", "fetched"])
def test_sharded_corpus_refuses_a_damaged_manifest(
    made: Shards, cache: Cache, content: bytes, place: str
) -> None:
    (made.folder / MANIFEST).write_bytes(content)
    with pytest.raises(DataError):
        ShardedCorpus(str(made.folder) if place == "local" else url(made.folder), cache)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


FILES = ["train_00000.tokens.npy", "validation_00000.ends.npy", "train.counts.npy"]


@pytest.mark.parametrize("file", FILES)
def test_sharded_corpus_refuses_a_damaged_remote_shard(
    made: Shards, cache: Cache, file: str
) -> None:
    flip(made.folder / file)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{file}.* is damaged"):
            ShardedCorpus(url(made.folder), cache)
    assert not tree(cache.root)


@pytest.mark.parametrize("file", FILES[:2])
def test_sharded_corpus_refuses_a_damaged_local_shard(
    made: Shards, cache: Cache, file: str
) -> None:
    flip(made.folder / file)
    with pytest.raises(DataError, match=rf"{file} is damaged"):
        ShardedCorpus(str(made.folder)).shards(BYTES, cache)


def test_shard_damaged_in_transfer_is_downloaded_again(
    made: Shards, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = type(fsspec.filesystem("file"))
    get = system.get_file
    seen = set()

    def torn(self: Any, source: str, target: str, **more: Any) -> None:
        get(self, source, target, **more)
        if source not in seen:
            seen.add(source)
            flip(Path(target))

    monkeypatch.setattr(system, "get_file", torn)
    monkeypatch.setattr(Shards, "files_without_checksum", lambda self: [])
    monkeypatch.setattr(Shards, "verify", lambda self: None)
    fetched = read_shards(ShardedCorpus(url(made.folder), cache)._made.folder)
    for record in fetched.records("train"):
        for file, expected in fetched.checksums(record):
            assert hashlib.sha256(file.read_bytes()).hexdigest() == expected


def test_downloaded_shards_with_ids_beyond_num_tokens_are_refused(
    made: Shards, cache: Cache
) -> None:
    """The checksums of the shards are correct, so that only a check of all ids finds the fault."""
    path = made.folder / "train_00000.tokens.npy"
    tokens = np.load(path)
    tokens[3] = 60000
    np.save(path, tokens)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    change(made.folder, lambda manifest: manifest["parts"]["train"][0].update(tokens_sha256=sha256))
    with pytest.raises(
        DataError, match=r"holds the id 60000, but the ids of the tokenizer are 0\.\.256"
    ):
        ShardedCorpus(url(made.folder), cache)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_cached_shards_are_downloaded_again(
    made: Shards, cache: Cache, damage: str
) -> None:
    copy = ShardedCorpus(url(made.folder), cache)._made.folder
    path = copy / "train_00000.tokens.npy"
    whole = path.read_bytes()
    if damage == "flipped":
        flip(path)
    elif damage == "cut":
        path.write_bytes(whole[:-2])
    else:
        path.unlink()
    assert ShardedCorpus(url(made.folder), cache)._made.folder == copy
    assert path.read_bytes() == whole


def test_cache_detects_changed_content_with_unchanged_size_and_time(
    tmp_path: Path,
) -> None:
    def build(place: Path) -> None:
        (place / "file").write_text("content")

    entry = Cache(tmp_path).load_or_build("kind", {}, build)
    times = (entry / "file").stat()
    (entry / "file").write_text("CONTENT")
    os.utime(entry / "file", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (Cache(tmp_path).load_or_build("kind", {}, build) / "file").read_text() == "content"


def test_source_corpus_refuses_damaged_cached_shards(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    corpus = SourceCorpus(open_file_source([str(tmp_path / "a.txt")]), held_out=0.3)
    folder = corpus.shards(BYTES, cache).folder
    flip(folder / "train_00000.tokens.npy")
    with pytest.raises(DataError, match=r"train_00000\.tokens\.npy is damaged"):
        corpus.shards(BYTES, cache)


def test_write_shards_ignores_a_journal_that_names_foreign_files(tmp_path: Path) -> None:
    """An interrupted build resumes from the file names in its journal, which could be foreign."""

    def stopped(cursor: Any) -> Any:
        yield Chunk(["abc"], 1)
        raise KeyboardInterrupt

    chunks = [Chunk(["abc"], 1), Chunk(["de"], 2)]
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", stopped, BYTES, source={}, shard_tokens=2)
    journal = json.loads((tmp_path / "s" / "journal.json").read_text())
    journal["parts"]["train"][0]["name"] = "../outside"
    (tmp_path / "s" / "journal.json").write_text(json.dumps(journal))
    made = write_shards(
        tmp_path / "s", lambda at: chunks[at or 0 :], BYTES, source={}, shard_tokens=2
    )
    assert [record.name for record in made.records("train")] == ["train_00000", "train_00001"]
    made.verify()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    model = {"weight": torch.arange(6.0).reshape(2, 3)}
    return Path(checkpoints.save(8, model, {"optimizer": {"step": torch.tensor(3)}}))


def reseal(folder: Path, file: str, content: bytes) -> None:
    """Change a file together with its checksum, as an attacker would."""
    (folder / file).write_bytes(content)
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(marker))


def box(manifest: Any) -> Any:
    return manifest["tensors"]["model.weight"]["chunks"][0]


CHECKPOINT_EDITS: dict[str, Callable[[Any], None]] = {
    "outside": lambda manifest: box(manifest).update(file="../../../x.safetensors"),
    "absolute": lambda manifest: box(manifest).update(file="/x.safetensors"),
    "backslash": lambda manifest: box(manifest).update(file="..\\x.safetensors"),
    "hidden": lambda manifest: box(manifest).update(file="..safetensors"),
    "other file": lambda manifest: box(manifest).update(file="state.json"),
    "not there": lambda manifest: box(manifest).update(file="none.safetensors"),
    "number": lambda manifest: box(manifest).update(file=3),
    "key": lambda manifest: box(manifest).update(path="x"),
    "beyond": lambda manifest: box(manifest).update(begin=10**15),
    "before": lambda manifest: box(manifest).update(begin=-8),
    "size": lambda manifest: manifest["tensors"]["model.weight"].update(size=[2, 10**15]),
    "box": lambda manifest: box(manifest).update(sizes=[2, 4]),
    "part": lambda manifest: box(manifest).update(sizes=[2, 2]),
    "dims": lambda manifest: box(manifest).update(sizes=[6]),
    "dtype": lambda manifest: manifest["tensors"]["model.weight"].update(dtype="OBJECT"),
    "chunks": lambda manifest: manifest["tensors"]["model.weight"].update(chunks=None),
    "tensors": lambda manifest: manifest.update(tensors=[1]),
}


@pytest.mark.parametrize("edit", CHECKPOINT_EDITS)
def test_checkpoint_refuses_a_changed_manifest(checkpoint: Path, edit: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    CHECKPOINT_EDITS[edit](manifest)
    reseal(checkpoint, "manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match="step_00000008"):
        Checkpoints(checkpoint.parent).read_weights()


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b"3", b'{"tensors": 3, "state": {"$tensor": "x"}}'],
)
def test_checkpoint_refuses_malformed_json_with_matching_checksum(
    checkpoint: Path, file: str, content: bytes
) -> None:
    reseal(checkpoint, file, content)
    with pytest.raises(CheckpointError, match=f"step_00000008/{file}"):
        Checkpoints(checkpoint.parent).load(8)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", ".."])
def test_checkpoint_refuses_complete_json_that_lists_files_outside_its_folder(
    checkpoint: Path, name: str
) -> None:
    marker = json.loads((checkpoint / "complete.json").read_text())
    marker["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match=r"complete\.json is damaged"):
        Checkpoints(checkpoint.parent).load(8)


@pytest.mark.parametrize(
    "marker",
    [b"", b"[]", b'{"format": null, "files": {}}', b'{"format": 2, "files": [1]}', b"\xff"],
)
def test_loading_a_checkpoint_refuses_a_damaged_file_complete_json(
    checkpoint: Path, marker: bytes
) -> None:
    (checkpoint / "complete.json").write_bytes(marker)
    with pytest.raises(CheckpointError, match=r"complete\.json"):
        Checkpoints(checkpoint.parent).load(8)
