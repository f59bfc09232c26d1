"""Existing paths are read literally, other paths are globs, and errors name unreadable paths."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ddiff.data.cache import Cache
from ddiff.data.documents import read_text_files
from ddiff.data.files import read_bytes, read_json
from ddiff.data.jsonl import read_json_lines
from ddiff.data.paths import check_disjoint, find_all_files, find_files
from ddiff.data.sources import open_file_source
from ddiff.errors import DataError

NAMES = [
    "b[1].txt",
    "[x] y.txt",
    "b?1.txt",
    "star*.txt",
    "b::1.txt",
    "a#b.txt",
    "a%20b.txt",
    "two  blanks .txt",
    "größe 日本.txt",
    "~tilde.txt",
    "-dash.txt",
    "{a,b}.txt",
    "$HOME.txt",
    "semi;colon&co.txt",
    "new\nline.txt",
    "back\\slash.txt",
    "UPPER.TXT",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.txt").write_text("held out")
    return tmp_path


def documents(kind: str, path: str) -> list[str]:
    if kind == "text":
        return list(
            read_text_files([path], validation=["held_out.txt"], cache=Cache("cache")).train["text"]
        )
    return [
        text
        for chunk in open_file_source([path], format="text", split="file").chunks()
        for text in chunk.texts
    ]


@pytest.mark.parametrize("kind", ["text", "files"])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_existing_path_is_not_interpreted_as_a_glob(
    folder: Path, kind: str, absolute: bool, name: str
) -> None:
    # Files that these names would match if they were interpreted as globs.
    for other in ("b1.txt", "bx1.txt", "x.txt", "a.txt", "star.txt"):
        (folder / other).write_text("another file")
    (folder / name).write_text(f"text of {name}")
    assert documents(kind, str(folder / name) if absolute else name) == [f"text of {name}"]


@pytest.mark.parametrize("kind", ["text", "files"])
def test_folder_name_with_brackets_is_not_interpreted_as_a_glob(folder: Path, kind: str) -> None:
    (folder / "[x] y").mkdir()
    (folder / "x y").mkdir()
    (folder / "[x] y" / "a.txt").write_text("in brackets")
    (folder / "x y" / "a.txt").write_text("without")
    assert documents(kind, "[x] y/*.txt") == documents(kind, "[x] y/a.txt") == ["in brackets"]


def test_read_json_lines_accepts_names_with_glob_characters(folder: Path) -> None:
    for name in ("b[1].jsonl", "v::2.jsonl"):
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    found = read_json_lines(["b[1].jsonl"], validation=["v::2.jsonl"])
    assert (found.train["text"], found.validation["text"]) == (["b[1].jsonl"], ["v::2.jsonl"])


def test_file_name_that_is_not_utf8_is_matched_and_escaped(folder: Path) -> None:
    raw = os.fsencode(folder) + b"/caf\xe9.txt"
    Path(os.fsdecode(raw)).write_text("by a name of bytes")
    (folder / "more").mkdir()
    found = read_text_files(["caf*.txt"], validation=["held_out.txt"], cache=Cache("cache")).train
    assert (found["text"], found["name"]) == (["by a name of bytes"], ["caf\\xe9.txt"])
    source = open_file_source(["caf*.txt"])
    assert [chunk.texts for chunk in source.chunks()] == [["by a name of bytes"]]
    json.dumps(source.identity, ensure_ascii=False).encode()  # as when a manifest is written
    Path(os.fsdecode(raw)).write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"caf\\xe9\.txt is not UTF-8") as raised:
        read_text_files(["caf*.txt"])
    str(raised.value).encode()  # as when it is printed


@pytest.mark.parametrize("ending", [".TXT", ".Txt", ".TXT.GZ", ".txt.Gz"])
def test_file_endings_are_case_insensitive(folder: Path, ending: str) -> None:
    import gzip

    content = b"upper case\n"
    (folder / f"f{ending}").write_bytes(
        gzip.compress(content) if "gz" in ending.lower() else content
    )
    assert [chunk.texts for chunk in open_file_source([f"f{ending}"]).chunks()] == [["upper case"]]


def test_find_files_returns_sorted_files_and_no_folders(folder: Path) -> None:
    for name in ("d/b.txt", "d/a.txt", "d/.hidden.txt", "d/e/c.txt", "d/e/f/g.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "d" / "folder.txt").mkdir()
    assert find_files("d/*.txt") == ["d/a.txt", "d/b.txt"]
    assert find_files("d/.*.txt") == ["d/.hidden.txt"]
    assert find_files("d/**/*.txt") == ["d/a.txt", "d/b.txt", "d/e/c.txt", "d/e/f/g.txt"]
    assert find_files("d/**") == find_files("d/**/*.txt")
    assert find_files("./d/[ab].txt") == ["./d/a.txt", "./d/b.txt"]
    assert find_files(f"file://{folder}/d/*.txt") == [f"{folder}/d/a.txt", f"{folder}/d/b.txt"]
    assert find_files(f"{folder}/*/e/*.txt") == [f"{folder}/d/e/c.txt"]


def test_find_files_terminates_on_circular_symbolic_links(folder: Path) -> None:
    (folder / "d" / "e").mkdir(parents=True)
    (folder / "d" / "a.txt").write_text("a")
    for number in range(3):  # followed without a limit, they would give 3**40 folders
        (folder / "d" / "e" / f"circle{number}").symlink_to(folder / "d", target_is_directory=True)
    assert find_files("d/**/*.txt") == ["d/a.txt"]
    (folder / "self.txt").symlink_to("self.txt")
    with pytest.raises(DataError, match=r"self\.txt is a link"):
        find_files("*.txt")


def test_find_all_files_lists_each_file_once(folder: Path) -> None:
    for name in ("x1.txt", "x2.txt"):
        (folder / name).write_text(name)
    (folder / "x3.txt").symlink_to("x1.txt")
    assert find_all_files(["x2.txt", "x*.txt", "./x1.txt", str(folder / "x2.txt")]) == [
        "x2.txt",
        "x1.txt",
    ]


def broken(folder: Path) -> dict[str, tuple[str, str]]:
    """Make unreadable paths; return (path, expected error message) for each kind, by name."""
    (folder / "d").mkdir()
    (folder / "dangling.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    return {
        "a folder": ("d", r"d is a folder.*d/\*\.txt"),
        "a folder with a slash": ("d/", "d/ is a folder"),
        "a link to nothing": ("dangling.txt", r"dangling\.txt is a link to nowhere\.txt"),
        "a link to nothing in a pattern": ("dang*.txt", r"dangling\.txt is a link"),
        "a pipe": ("pipe.txt", r"pipe\.txt is a pipe"),
        "a device": ("/dev/null", "/dev/null is a pipe or a device"),
        "nothing": ("none.txt", r"There is no file none\.txt"),
        "nothing, with brackets": (
            "none[1].txt",
            r"none\[1\]\.txt, and no file matches it as a pattern",
        ),
        "a missing folder": ("missing/*.txt", "There is no folder missing either"),
        "an empty path": ("", "There is no file"),
        "NUL": ("a\0b.txt", r"There is no file a\\x00b\.txt"),
        "a name that is too long": ("n" * 5000, "There is no file"),
        "an unknown protocol": ("nosuch://a.txt", "nosuch://a.txt cannot be opened"),
        "a file as a folder": ("held_out.txt/a.txt", "There is no file"),
    }


BROKEN = [
    "a folder",
    "a folder with a slash",
    "a link to nothing",
    "a link to nothing in a pattern",
    "a pipe",
    "a device",
    "nothing",
    "nothing, with brackets",
    "a missing folder",
    "an empty path",
    "NUL",
    "a name that is too long",
    "an unknown protocol",
    "a file as a folder",
]


@pytest.mark.parametrize("reader", [read_text_files, read_json_lines, open_file_source])
@pytest.mark.parametrize("kind", BROKEN)
def test_file_readers_refuse_paths_that_are_not_regular_files(
    folder: Path, reader: Any, kind: str
) -> None:
    path, message = broken(folder)[kind]
    refused: list[BaseException] = []

    def read() -> None:
        try:
            reader([path])
        except DataError as error:
            refused.append(error)

    thread = threading.Thread(
        target=read, daemon=True
    )  # in a thread, because opening a pipe would block forever
    thread.start()
    thread.join(20)
    assert len(refused) == 1
    with pytest.raises(DataError, match=rf"(?s){message}"):
        raise refused[0]


def test_file_readers_raise_an_error_that_names_a_file_without_permission(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.txt").write_text("secret")

    def refuse(*_: Any, **__: Any) -> Any:  # simulated, because permissions do not apply to root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for reader in (read_text_files, lambda paths: list(open_file_source(paths).chunks())):
        with pytest.raises(DataError, match=r"a\.txt cannot be read: permission denied"):
            reader(["a.txt"])


def test_check_disjoint_refuses_two_paths_of_one_file(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "link.txt").symlink_to("a.txt")
    with pytest.raises(
        DataError, match=r"link\.txt is named by validation and by files \(there as a\.txt\)"
    ):
        check_disjoint(["a.txt"], ["link.txt"])
    check_disjoint(["a.txt"], ["held_out.txt"])


def test_file_readers_accept_fsspec_file_systems_and_chains(folder: Path) -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("a.txt", "b.txt", "c.md"):
            archive.writestr(name, f"zipped {name}")
    system = fsspec.filesystem("memory")
    for name in ("b?1.txt", "bx1.txt", "[m].txt"):
        system.pipe(f"/odd{folder}/{name}", f"in memory {name}".encode())
    memory = f"memory://odd{folder}"
    assert documents("text", "zip://*.txt::x.zip") == ["zipped a.txt", "zipped b.txt"]
    assert documents("files", "zip://b.txt::x.zip") == ["zipped b.txt"]
    assert documents("text", f"{memory}/b?1.txt") == ["in memory b?1.txt"]
    assert documents("files", f"{memory}/[m].txt") == ["in memory [m].txt"]
    assert documents("text", f"simplecache::{memory}/b*.txt") == [
        "in memory b?1.txt",
        "in memory bx1.txt",
    ]
    with pytest.raises(DataError, match="is a folder"):
        find_files(memory)
    with pytest.raises(DataError, match="is named by validation"):
        read_text_files([f"{memory}/b*.txt"], validation=[f"{memory}/bx1.txt"])


def test_tilde_is_expanded_to_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.txt").write_text("at home")
    assert documents("text", "~/a.txt") == documents("text", "~/[a].txt") == ["at home"]
    assert (
        read_bytes("~/a.txt", "a file")
        == read_bytes(f"file://{folder}/a.txt", "a file")
        == b"at home"
    )


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\ufeff{}x", ""])
def test_read_json_raises_an_error_that_names_a_damaged_file(folder: Path, content: str) -> None:
    (folder / "a[1]::b.json").write_text(content)
    with pytest.raises(DataError, match=r"clusters: a\[1\]::b\.json is not a complete JSON file"):
        read_json("a[1]::b.json", "clusters")
