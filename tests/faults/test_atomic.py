"""Atomic writes on local and remote paths, their partial files, and locks between processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from ddiff.atomic import copy_atomic, lock_file, open_atomic, original_name, partial_name
from ddiff.atomic import write_atomic as write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_original_name_is_recovered_from_the_name_of_a_partial_file() -> None:
    one, two = partial_name("tokenizer.json"), partial_name("tokenizer.json")
    assert one != two
    assert original_name(one) == original_name(two) == "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("recipe.toml", "recipe.toml"),
        ("recipe.toml.partial-0123abcd", "recipe.toml"),
        ("recipe.toml.part", "recipe.toml"),
        ("vocabulary.safetensors.0a1b2c3d.part", "vocabulary.safetensors"),
        ("recipe.toml.partial", "recipe.toml.partial"),
        ("recipe.toml.part.txt", "recipe.toml.part.txt"),
    ],
)
def test_original_name_is_recovered_from_partial_files_of_older_versions(
    name: str, original: str
) -> None:
    assert original_name(name) == original


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("kind", [str, Path])
def test_write_atomic_replaces_a_local_file(tmp_path: Path, kind: type, sync: bool) -> None:
    path = (
        tmp_path / "new" / "folder" / "a::b#c.txt" if kind is Path else tmp_path / "new" / "a.txt"
    )
    write(kind(path), "first", sync=sync)
    write(kind(path), b"second", sync=sync)
    assert path.read_text() == "second"
    assert names(path.parent) == [path.name]


def test_write_atomic_writes_to_any_fsspec_path() -> None:
    memory = fsspec.filesystem("memory")
    write("memory://atomic/folder/a.txt", "text")
    write("/atomic/folder/b.txt", "text", system=memory)
    found = memory.ls("/atomic/folder", detail=False)
    assert sorted(found) == ["/atomic/folder/a.txt", "/atomic/folder/b.txt"]
    assert memory.cat_file("/atomic/folder/a.txt") == b"text"


@pytest.mark.parametrize("where", ["local", "memory"])
def test_failed_write_atomic_keeps_the_old_file_and_raises_an_error_that_names_it(
    tmp_path: Path, where: str
) -> None:
    folder = str(tmp_path) if where == "local" else "memory://atomic_errors"
    path = f"{folder}/a.txt"
    write(path, "old")

    def fail(error: OSError) -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match="10 requested and 4 written"):
        fail(OSError("10 requested and 4 written"))
    system, place = fsspec.url_to_fs(folder)
    assert system.cat_file(f"{place}/a.txt") == b"old"
    assert [Path(name).name for name in system.ls(place, detail=False)] == ["a.txt"]


def test_copy_atomic_overwrites_the_partial_file_of_a_killed_copy(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("whole")
    system = fsspec.filesystem("memory")
    system.pipe_file("/atomic_copy/target.partial", b"half")
    copy_atomic(tmp_path / "source", "/atomic_copy/target", system)
    assert system.ls("/atomic_copy", detail=False) == ["/atomic_copy/target"]
    assert system.cat_file("/atomic_copy/target") == b"whole"
    local = fsspec.filesystem("file")
    copy_atomic(tmp_path / "source", str(tmp_path / "target"), local)
    assert (tmp_path / "target").read_text() == "whole"
    assert names(tmp_path) == ["source", "target"]


HOLD = """
import sys, time
from ddiff.atomic import lock_file
with open(sys.argv[1], "w") as file:
    print(lock_file(file), flush=True)
    time.sleep(60)
"""


def test_file_lock_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with path.open("a") as file:
            assert lock_file(file) is False
            began = time.monotonic()
            assert lock_file(file, patience=0.3) is False
            assert time.monotonic() - began >= 0.3
            holder.kill()
            assert lock_file(file, patience=30.0) is True
