"""Fixtures: Python distributions that exist for one test, and training without a real device."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

MakeDistribution = Callable[..., Path]

# A shell that starts the suite in the background makes it ignore SIGINT, which commands under test
# would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_distribution(
    folder: Path,
    name: str,
    version: str,
    entry_points: Mapping[str, str],
    modules: Mapping[str, str],
) -> Path:
    """Write an installed Python distribution into `folder`: modules and metadata, as pip does.

    `modules` maps dotted names to source code; `entry_points` maps plugin names to modules.
    """
    folder.mkdir(parents=True)
    for module, source in modules.items():
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    lines = [f"{plugin} = {target}" for plugin, target in entry_points.items()]
    (information / "entry_points.txt").write_text("\n".join(["[ddiff]", *lines, ""]))
    return folder


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDistribution]:
    """Function that installs a Python distribution for one test, in a folder on sys.path."""
    made: list[str] = []

    def make(
        name: str, version: str, entry_points: Mapping[str, str], modules: Mapping[str, str]
    ) -> Path:
        folder = write_distribution(
            tmp_path / "site" / str(len(made)), name, version, entry_points, modules
        )
        made.extend(modules)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield make
    for module in made:
        sys.modules.pop(module, None)


class NoBlockingCopies(TorchDispatchMode):
    """Dispatch mode in which a blocking copy from the host to "meta" raises an error.

    Copies in `to_device` are allowed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = {"aten._to_copy.default": 0, "aten.copy_.default": 1}.get(str(func))
        if source is not None and result.is_meta and not args[source].is_meta:
            callers = {frame.name for frame in traceback.extract_stack()}
            assert (kwargs or {}).get("non_blocking") or "to_device" in callers, (
                f"{func} waits for the device"
            )
        return result


@pytest.fixture
def no_sync_guard(monkeypatch: pytest.MonkeyPatch) -> type[NoBlockingCopies]:
    """Let a training step run on the device "meta", to find synchronizations with a GPU.

    Tensors on "meta" have no values, so reading a value raises an error. Autocast and the fused
    AdamW of torch do not support "meta", and are replaced. The fixture returns a mode in which
    blocking copies raise errors too. Enter this mode after the first step, because the first step
    copies constants.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    return NoBlockingCopies
