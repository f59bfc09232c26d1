"""Full disk, exceeded quota, read-only cache: a one-line error, and no partial file is left."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddiff import errors
from ddiff.cli import process
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data import shards
from ddiff.data.cache import Cache
from ddiff.data.corpus import SourceCorpus, load_or_build_shards
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.sources import open_file_source
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import DataError, find_disk_full

BYTES = BytePairTokenizer.train(["text"], 257)
TEXTS = [f"text number {number}" for number in range(3000)]  # 100 kB of tokens


def mount(place: Path, *options: str) -> bool:
    """Mount a file system in memory at `place`; return whether the mount succeeded."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Folder on a mounted file system of 40 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount(place, "size=40k"):
        pytest.skip("mounting a file system requires root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "array", [np.arange(0), np.arange(7, dtype=np.uint16), np.arange(9)[::2]], ids=str
)
def test_write_array_writes_the_same_bytes_as_numpy_save(tmp_path: Path, array: Any) -> None:
    shards._write_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_shards_on_a_full_disk_raise_enospc_and_leave_no_file(small_disk: Path) -> None:
    documents = Documents(documents_from_texts(TEXTS), documents_from_texts(TEXTS[:1]))
    with pytest.raises(OSError, match="No space left") as caught:
        load_or_build_shards(documents, BYTES, Cache(small_disk))
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).endswith("train_00000.tokens.npy")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_write_shards_resumes_after_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """Resuming keeps the complete shards that the journal lists, and removes partial files."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    corpus = SourceCorpus(open_file_source([str(tmp_path / "a.txt")]), held_out=0.1)
    with pytest.raises(OSError, match="No space left"):
        corpus.write_shards(BYTES, small_disk / "shards")
    assert not list(small_disk.rglob("*.partial*"))
    assert mount(small_disk, "remount", "size=4000k")
    corpus.write_shards(BYTES, small_disk / "shards").verify()


def test_save_on_a_full_disk_leaves_no_partial_file(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 36_000)
    tokenizer = BytePairTokenizer.train(TEXTS, 300)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(str(small_disk / "tokenizer.json"))
    with pytest.raises(OSError, match="No space left"):
        FlatVocabulary(2000).save(str(small_disk / "vocabulary.safetensors"))
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_corpora_read_finished_shards_from_a_read_only_cache(
    small_disk: Path, tmp_path: Path
) -> None:
    assert mount(small_disk, "remount", "size=4000k")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:200]))
    corpus = SourceCorpus(open_file_source([str(tmp_path / "a.txt")]), held_out=0.1)
    documents = Documents(documents_from_texts(TEXTS), documents_from_texts(TEXTS[:1]))
    made = (
        corpus.shards(BYTES, Cache(small_disk)),
        load_or_build_shards(documents, BYTES, Cache(small_disk)),
    )
    assert mount(small_disk, "remount", "ro")
    assert corpus.shards(BYTES, Cache(small_disk)).folder == made[0].folder
    assert load_or_build_shards(documents, BYTES, Cache(small_disk)).folder == made[1].folder
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[:100]))
    other = SourceCorpus(open_file_source([str(tmp_path / "b.txt")]), held_out=0.1)
    for build in (
        lambda: other.shards(BYTES, Cache(small_disk)),
        lambda: load_or_build_shards(
            Documents(documents_from_texts(TEXTS[1:]), documents_from_texts(TEXTS[:1])),
            BYTES,
            Cache(small_disk),
        ),
    ):
        with pytest.raises(
            DataError, match=r"cannot be written \(Read-only file system\).*DDIFF_CACHE"
        ):
            build()


def test_cache_folder_that_is_a_file_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:100]))
    corpus = SourceCorpus(open_file_source([str(tmp_path / "a.txt")]), held_out=0.1)
    with pytest.raises(DataError, match=r"cannot be written .*DDIFF_CACHE"):
        corpus.shards(BYTES, Cache(tmp_path / "file"))


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        OSError("1213873 requested and 495552 written"),  # message of numpy.ndarray.tofile
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        with_cause(ValueError("cannot be stored"), OSError(errno.ENOSPC, "")),
    ],
    ids=str,
)
def test_command_reports_every_full_disk_error_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(process, "app", full)
    with pytest.raises(SystemExit) as ended:
        process.main([])
    assert ended.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(("No space left on device", "Disk quota exceeded", "File too large"))
    assert "Free disk space" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "Permission denied"), ValueError("written"), OSError("cannot read")],
    ids=str,
)
def test_find_disk_full_returns_none_for_other_errors(error: Exception) -> None:
    assert find_disk_full(error) is None
    assert errno.ENOSPC in errors.DISK_FULL


def test_run_under_a_file_size_limit_prints_a_one_line_error(tmp_path: Path) -> None:
    """The limit `ulimit -f` acts like a disk quota and needs no root rights."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    ended = subprocess.run(
        [sys.executable, "-m", "ddiff", "run", "mdlm_small", "--set", "data.length=16"],
        cwd=tmp_path,
        env={**os.environ, "DDIFF_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("File too large: ")
    assert "train_00000.tokens.npy" in last
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "cache").rglob("*.partial*"))


def test_cache_build_keeps_the_directory_of_another_running_build(tmp_path: Path) -> None:
    def build(place: Path) -> None:
        (place / "file").write_text("half")
        Cache(tmp_path).load_or_build("rows", {"other": 1}, lambda other: None)
        assert (place / "file").exists()

    assert (Cache(tmp_path).load_or_build("rows", {}, build) / "file").read_text() == "half"


def test_cache_without_locks_removes_only_old_unfinished_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ddiff.atomic.fcntl.flock", no_locks)
    old, new = (tmp_path / "rows" / f"{name}.partial-0" for name in ("old", "new"))
    for partial in (old, new):
        partial.mkdir(parents=True)
        (partial / ".lock").write_text("")
    for path in (old / ".lock", old):
        os.utime(path, (0, 0))
    Cache(tmp_path).load_or_build("rows", {}, lambda place: None)
    assert (old.exists(), new.exists()) == (False, True)
