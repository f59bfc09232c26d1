"""Import rules: the package ddiff names no model family, and plugins use only public names."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from code_count import names_and_strings

import ddiff

ROOT = Path(__file__).parents[2]
ENGINE = Path(ddiff.__file__).parent
FAMILIES = re.compile(r"(?<![a-z])(hdlm|mdlm|gidd|sedd|udlm|duo(?![a-z])|remdm|bd3)", re.IGNORECASE)
EXAMPLE = re.compile(
    r"kimura", re.IGNORECASE
)  # docstrings contain examples with a plugin of this name
BELOW_TRAINING = ("core", "nn", "sampling", "data", "clustering")


def sources(*rooms: str) -> list[Path]:
    found = [path for room in rooms or ("",) for path in sorted((ENGINE / room).rglob("*.py"))]
    assert len(found) >= 3 * max(
        1, len(rooms)
    )  # with a wrong folder every test in this file would pass
    return found


def test_ddiff_package_does_not_mention_names_of_model_families() -> None:
    named = {
        str(path): match[0]
        for path in sources()
        if (match := FAMILIES.search(path.read_text(encoding="utf-8")))
    }
    assert named == {}


def test_ddiff_package_does_not_mention_the_example_plugin() -> None:
    spoken = {
        str(path): list(names_and_strings(path.read_text(encoding="utf-8"))) for path in sources()
    }
    assert {path for path, words in spoken.items() if any(map(EXAMPLE.search, words))} == set()


@pytest.mark.parametrize(
    "line", ["x = is_mdlm", 'if kind == "HDLM":', "import ddiff_sedd", "# as BD3LM does", "Duo()"]
)
def test_family_name_search_finds_names_strings_and_comments(line: str) -> None:
    assert FAMILIES.search(line)


def test_packages_below_training_do_not_use_torch_distributed() -> None:
    """Check the sources as text, because import-linter cannot forbid a submodule of torch."""
    naming = [
        path
        for path in sources(*BELOW_TRAINING)
        if "torch.distributed" in path.read_text(encoding="utf-8")
    ]
    assert naming == []


def uses(tree: ast.AST) -> Iterator[str]:
    """Iterate over the imports of a file, as `module` or `module:name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "ddiff"
        ):
            yield f"ddiff:{node.attr}"


def is_public(use: str) -> bool:
    """Return whether an import of ddiff is the package, a public name, or ddiff.testing."""
    module, _, name = use.partition(":")
    return module == "ddiff.testing" or (
        module == "ddiff" and name in {"", "testing", *ddiff.__all__}
    )


def plugins_used(source: str) -> set[str]:
    """Return the plugins that a file imports."""
    return {
        use.partition(":")[0].partition(".")[0]
        for use in uses(ast.parse(source))
        if use.startswith("ddiff_")
    }


def test_plugins_do_not_import_each_other() -> None:
    """Check imports between plugins; the import-linter contract in pyproject.toml lists all."""
    plugins = {path.parent for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert {plugin.name for plugin in plugins} >= {"ddiff_core", "ddiff_hdlm", "ddiff_mdlm"}
    used = {
        plugin.name: plugins_used(
            "\n".join(path.read_text(encoding="utf-8") for path in sorted(plugin.rglob("*.py")))
        )
        for plugin in plugins
    }
    assert {name: others - {name} for name, others in used.items() if others - {name}} == {}
    contract = read_project()["tool"]["importlinter"]["contracts"][-1]
    assert contract["type"] == "independence"
    assert set(contract["modules"]) == set(used)


def test_every_plugin_is_registered_and_checked_by_the_import_linter() -> None:
    plugins = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    project = read_project()
    assert set(project["project"]["entry-points"]["ddiff"].values()) == plugins
    assert set(project["tool"]["importlinter"]["root_packages"]) == {"ddiff", *plugins}


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def private_uses(source: str) -> list[str]:
    return [
        use for use in uses(ast.parse(source)) if re.match(r"ddiff\b", use) and not is_public(use)
    ]


def test_plugins_and_examples_use_only_public_names_of_ddiff() -> None:
    """Shipped plugins and examples import only what an external plugin may import."""
    outside = [
        path for room in ("plugins", "examples") for path in sorted((ROOT / room).rglob("*.py"))
    ]
    assert len(outside) >= 15  # with a wrong folder this test would pass
    private = {
        str(path): found
        for path in outside
        if (found := private_uses(path.read_text(encoding="utf-8")))
    }
    assert private == {}


@pytest.mark.parametrize(
    "line",
    [
        "import ddiff.core.prediction",
        "from ddiff.nn.heads import TokenHead",
        "from ddiff import core",
        "from ddiff import _modules",
        "def build():\n    from ddiff.errors import DataError",
        "from ddiff.testing.process import check_process",
        "import ddiff\nddiff.core.prediction.DenseDistribution",
    ],
)
def test_check_for_private_imports_detects_every_form_of_import(line: str) -> None:
    assert private_uses(line) != []


def test_check_for_private_imports_accepts_public_imports() -> None:
    lines = (
        "import ddiff",
        "from ddiff import Vocabulary",
        "from ddiff.testing import check_process",
        "import ddiff_dit",
        "import ddiff\nddiff.run",
    )
    assert private_uses("\n".join(lines)) == []
