"""The table of modules in docs/architecture.md is complete."""

from __future__ import annotations

import re
from pathlib import Path

import ddiff

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
