"""Pages of the API: one page per package with public names, one for `ddiff.testing`.

The page of `ddiff.core` documents its modules completely, because the theory refers to them. The
other pages document the names that `ddiff/__init__.pyi` lists.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TITLES = {
    "recipe": "Recipes",
    "runs": "Runs",
    "run_dir": "Files of a run",
    "data": "Data",
    "clustering": "Clusters of tokens",
    "core": "Processes and the bound",
    "nn": "Networks",
    "sampling": "Samplers",
    "training": "Training",
    "distributed": "Processes and devices",
    "checkpoint": "Checkpoints",
    "evaluation": "Evaluation",
    "plugin": "Plugins",
    "errors": "Errors",
}
"""Titles of the pages of packages with public names."""

COMPLETE = "core"
"""Package of which all modules are documented."""


def read_public_names(stub: Path) -> dict[str, list[str]]:
    """Return the public objects by package, as `module.name` after `ddiff.`, from a stub file."""
    names = defaultdict(list)
    for statement in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            package = statement.module.partition(".")[0]
            names[package] += [f"{statement.module}.{alias.name}" for alias in statement.names]
    return dict(names)


def list_modules(folder: Path) -> list[str]:
    """Return the names of the modules in a folder, without those that begin with `_`."""
    return [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]


def write_page(title: str, introduction: str, objects: list[str], full_path: bool = False) -> str:
    """Return a page with the documentation of objects, which mkdocstrings reads from the source."""
    options = f"    options:\n      show_root_full_path: {str(full_path).lower()}"
    directives = [f"::: ddiff.{name}\n{options}" for name in objects]
    return "\n\n".join([f"# {title}", introduction, *directives]) + "\n"


def write_api_pages(package: Path) -> dict[str, str]:
    """Return the pages of the API by file name, from the source of the package `ddiff`."""
    public = read_public_names(package / "__init__.pyi")
    pages = {}
    for name, title in TITLES.items():
        introduction = f"Public names of `ddiff` that are defined in `ddiff/{name}`."
        objects = public[name]
        if name == COMPLETE:
            introduction = f"The modules of `ddiff.{name}`."
            objects = [f"{name}.{module}" for module in list_modules(package / name)]
        pages[f"{name}.md"] = write_page(title, introduction, objects, name == COMPLETE)
    testing = "Functions of `ddiff.testing`, the conformance kit."
    pages["testing.md"] = write_page("Conformance kit", testing, ["testing"], True)
    return pages
