"""The tables of modules, members and kinds in docs/architecture.md are complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import ddiff
from ddiff.plugin.registry import KINDS, Members

ROOT = Path(__file__).parents[2]
ENGINE = Path(ddiff.__file__).parent


def listed_modules() -> set[str]:
    """Return the modules of the table, as `ddiff/core/times`."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("### Modules\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(ddiff[\w/]*)` \| (.*) \|$", section, re.MULTILINE)
    return {f"{folder}/{name}" for folder, names in rows for name in re.findall(r"`(\w+)`", names)}


def test_architecture_page_lists_exactly_the_modules_of_ddiff() -> None:
    files = {
        path.relative_to(ENGINE.parent).with_suffix("").as_posix()
        for path in ENGINE.rglob("*.py")
        if path.name != "__init__.py"
    }
    listed = listed_modules()
    assert files - listed == set(), "add these modules to the table in docs/architecture.md"
    assert listed - files == set(), "remove these modules from the table in docs/architecture.md"


def read_table(sentence: str) -> dict[str, str]:
    """Return the rows of the table below a sentence. The keys are the first words of the rows."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition(f"\n{sentence}")[2].split("\n\n")[1]
    return {re.findall(r"\w+", row)[0]: row for row in table.splitlines()[2:]}


def test_architecture_page_lists_every_member_that_a_component_may_define() -> None:
    listed = read_table("A component may also define these members.").keys()
    members = {member.name for member in fields(Members)} - {"build", "Config"}
    assert members - listed == set(), "add these members to the table in docs/architecture.md"
    assert listed - members == set(), "remove these members from the table"


def test_architecture_page_lists_every_kind_with_the_inputs_of_build() -> None:
    rows = read_table("The table lists the inputs that `build` may name:")
    assert rows.keys() == KINDS.keys()
    for kind, description in KINDS.items():
        inputs = re.search(r"build\(config(?:, \*, ([^)]*))?\)", description)
        assert inputs is not None, description
        if inputs[1] and "sub-components" not in inputs[1]:
            assert f"`{inputs[1]}`" in rows[kind], kind
