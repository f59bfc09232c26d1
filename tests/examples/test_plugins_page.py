"""docs/plugins.md has an example of every kind of component, and every example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES

from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.registry import KINDS, Members
from ddiff.testing.check_command import MAKERS

PAGE = (EXAMPLES.parent / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLE_OF = dict(re.findall(r"^### (\w+)\n.*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


def test_plugins_page_has_an_example_of_every_kind() -> None:
    assert set(EXAMPLE_OF) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_example_of_the_plugins_page_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the example of a tracker writes a file
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "example"}
    # without the annotations of this file, which pydantic could not resolve
    exec(compile(EXAMPLE_OF[kind], kind, "exec", dont_inherit=True), names)
    own = [value for value in names.values() if getattr(value, "__module__", "") == "example"]
    components = [Members.collect(value) for value in own if isinstance(value, type)]
    (component,) = [one for one in components if callable(one.build)]
    assert issubclass(component.Config, ComponentConfig)


def test_plugins_page_lists_the_kinds_with_and_without_laws() -> None:
    checked, unchecked = re.search(
        r"components of these kinds: (.*?)\. .*The kinds (.*?) have no laws", PAGE, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert set(re.findall(r"\w+", checked)) - {"and"} == set(MAKERS)
    assert set(re.findall(r"\w+", unchecked)) - {"and"} == set(KINDS) - set(MAKERS)
