"""Throw-away distributions: a folder on sys.path with a dist-info, as pip would leave it; and a device without answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from textwrap import dedent

import pytest
import torch

MakeDistribution = Callable[..., Path]


def write_distribution(
    folder: Path, name: str, version: str, entry_points: Mapping[str, str], modules: Mapping[str, str]
) -> Path:
    """Write modules (dotted name -> source) and the dist-info of a distribution into a new folder."""
    folder.mkdir(parents=True)
    for module, source in modules.items():
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{plugin} = {target}" for plugin, target in entry_points.items()]
    (information / "entry_points.txt").write_text("\n".join(["[ddiff]", *lines, ""]))
    return folder


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDistribution]:
    """`distribution(name, version, entry_points, modules)` installs one for the time of a test."""
    made: list[str] = []

    def make(name: str, version: str, entry_points: Mapping[str, str], modules: Mapping[str, str]) -> Path:
        folder = write_distribution(tmp_path / "site" / str(len(made)), name, version, entry_points, modules)
        made.extend(modules)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield make
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes "meta" fit for a training step: a device whose tensors have no values, so that to ask one is an error.

    It stands for a GPU that is not waited for. Autocast, which it does not know, is left out.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
