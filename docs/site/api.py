"""Pages of the API: the public names of `ddiff`, and all names of `ddiff.core` and `ddiff.testing`."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGES = {
    "recipe": "recipes",
    "runs": "runs",
    "run_dir": "files of a run",
    "data": "data",
    "clustering": "clusters of tokens",
    "core": "vocabularies, processes and the bound",
    "nn": "networks",
    "sampling": "samplers",
    "training": "training",
    "distributed": "processes and devices",
    "checkpoint": "checkpoints and published layouts",
    "evaluation": "evaluation",
    "plugin": "plugins",
    "errors": "errors",
}
"""Packages with public names, in the order of the pages, and the contents of each page."""

NOT_DOCUMENTED = "API_VERSION"
"""Names without a docstring of their own; the page of plugins describes them."""


def read_public_names(stub: Path) -> dict[str, list[str]]:
    """Return the public objects of `ddiff` by package, as `module.name`, from `__init__.pyi`."""
    names = defaultdict(list)
    for statement in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            package = statement.module.partition(".")[0]
            for alias in statement.names:
                names[package].append(f"ddiff.{statement.module}.{alias.name}")
    return dict(names)
