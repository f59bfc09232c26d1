"""Cache entries are determined by their inputs, complete or absent, and rebuilt if damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddiff.data.cache import Cache, default_root
from ddiff.errors import DataError


class Builder:
    """Build function that writes one file and counts its calls."""

    def __init__(self, content: str = "content") -> None:
        self.calls = 0
        self.content = content

    def __call__(self, place: Path) -> None:
        self.calls += 1
        (place / "file").write_text(self.content)


def test_cache_entry_path_depends_on_kind_and_inputs_only(tmp_path: Path) -> None:
    build = Builder()
    first = Cache(tmp_path).load_or_build("rows", {"a": 1, "b": [2, 3]}, build)
    assert Cache(tmp_path).load_or_build("rows", {"b": [2, 3], "a": 1}, build) == first
    assert build.calls == 1
    others = [
        Cache(tmp_path).load_or_build("rows", {"a": 1, "b": [3, 2]}, build),
        Cache(tmp_path).load_or_build("trees", {"a": 1}, build),
    ]
    assert build.calls == 3
    assert len({first, *others}) == 3


def test_cache_removes_the_directory_of_a_failed_build(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "file").write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        Cache(tmp_path).load_or_build("rows", {}, fail)
    assert list((tmp_path / "rows").iterdir()) == []
    assert (Cache(tmp_path).load_or_build("rows", {}, Builder()) / "file").read_text() == "content"


@pytest.mark.parametrize("inputs", [{}, {"other": 1}], ids=["same entry", "another entry"])
def test_cache_removes_the_unfinished_directory_of_a_killed_build(
    tmp_path: Path, inputs: dict[str, int]
) -> None:
    script = (
        "import os, signal, sys\n"
        "from ddiff.data.cache import Cache\n"
        "def build(place):\n"
        "    (place / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Cache(sys.argv[1]).load_or_build('rows', {}, build)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "rows").iterdir())) == 1
    build = Builder()
    entry = Cache(tmp_path).load_or_build("rows", inputs, build)
    assert (entry / "file").read_text() == "content"
    assert build.calls == 1
    assert list((tmp_path / "rows").iterdir()) == [entry]


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "unlisted", "not_json"])
def test_cache_rebuilds_a_damaged_entry(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    entry = Cache(tmp_path).load_or_build("rows", {"a": 1}, build)
    contents = entry / "entry.json"
    if damage == "truncated":
        (entry / "file").write_text("con")
    elif damage == "missing":
        (entry / "file").unlink()
    elif damage == "foreign":
        contents.write_text(json.dumps(json.loads(contents.read_text()) | {"inputs": {"a": 2}}))
    elif damage == "unlisted":
        contents.unlink()
    else:
        contents.write_text('{"format"')
    again = Cache(tmp_path).load_or_build("rows", {"a": 1}, build)
    assert build.calls == 2
    assert (again / "file").read_text() == "content"
    assert str(entry) in caplog.text
    assert [place.name for place in (tmp_path / "rows").iterdir()] == [entry.name]


def test_cache_keeps_the_entry_that_another_process_built_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def slow(place: Path) -> None:
        cache.load_or_build("rows", {}, Builder("first"))
        (place / "file").write_text("second")

    assert (cache.load_or_build("rows", {}, slow) / "file").read_text() == "first"


def test_default_cache_root_follows_environment_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "here"))
    assert default_root() == Cache().root == tmp_path / "here"
    monkeypatch.delenv("DDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "ddiff"


def test_cache_raises_an_error_that_names_a_cache_folder_that_cannot_be_used(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="memory-mapped"):
        Cache("memory://cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="DDIFF_CACHE"):
        Cache(tmp_path / "file").load_or_build("rows", {}, Builder())
