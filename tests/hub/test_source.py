"""Generated source: which definitions are copied, in which order and under which names."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from ddiff import ArgumentError
from ddiff.runs.hub.source import Place, generate_source

FIRST = """
    from __future__ import annotations

    import math
    from typing import TYPE_CHECKING

    from .second import Base, LIMIT
    from .second import helper as imported_helper

    if TYPE_CHECKING:
        from .second import Kind

    # Why it is two.
    SCALE = 2.0
    '''Scale of the results.'''
    UNUSED = 3.0


    def helper(value: float) -> float:
        # A comment of the copied code.
        return math.floor(value) * SCALE


    class Thing(Base):
        '''Thing that is copied.'''

        def run(self, kind: Kind) -> float:
            return self._scaled() + imported_helper(LIMIT)

        def _scaled(self) -> float:
            return helper(1.5)

        def unused(self) -> float:
            return missing_name()
"""
SECOND = """
    from __future__ import annotations

    LIMIT = 7


    class Kind:
        pass


    class Base:
        def run(self, kind: Kind) -> float:
            raise NotImplementedError

        def other(self) -> None:
            raise NotImplementedError


    def helper(value: int) -> int:
        return -value
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Package with two modules, which both define `helper`."""
    folder = tmp_path / "two_modules"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "first.py").write_text(dedent(FIRST))
    (folder / "second.py").write_text(dedent(SECOND))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder.name
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def execute(text: str) -> dict[str, Any]:
    contents: dict[str, Any] = {"__name__": "generated"}
    exec(compile(text, "generated", "exec"), contents)
    return contents


def test_generated_source_computes_what_the_modules_compute(package: str) -> None:
    text = generate_source([Place(f"{package}.first", "Thing")], ["run"], "Header.")
    assert execute(text)["Thing"]().run(None) == 2.0 - 7.0


def test_unused_definitions_and_methods_are_left_out(package: str) -> None:
    text = generate_source([Place(f"{package}.first", "Thing")], ["run"], "Header.")
    assert text.startswith('"""Header."""\n')
    for left_out in ("UNUSED", "def unused", "def other", "class Kind", "missing_name"):
        assert left_out not in text
    assert "Kind = Any" in text
    assert "# A comment of the copied code." in text
    assert "# Why it is two.\nSCALE = 2.0\n'''Scale of the results.'''" in text


def test_equal_names_of_two_modules_get_numbers(package: str) -> None:
    text = generate_source([Place(f"{package}.first", "Thing")], ["run"], "Header.")
    assert text.count("def helper(") == 1
    assert text.count("def helper_2(") == 1


def test_other_packages_are_refused_by_name(package: str, tmp_path: Path) -> None:
    module = tmp_path / package / "third.py"
    module.write_text("import pydantic as pd\n\n\ndef draw():\n    return pd.BaseModel\n")
    with pytest.raises(ArgumentError, match="needs pd of pydantic"):
        generate_source([Place(f"{package}.third", "draw")], [], "Header.")


def test_definitions_of_other_packages_are_not_copied(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign.py").write_text("def double(value):\n    return 2 * value\n")
    module = tmp_path / package / "third.py"
    module.write_text("from foreign import double\n\n\ndef run():\n    return double(2)\n")
    with pytest.raises(ArgumentError, match="needs double of foreign"):
        generate_source([Place(f"{package}.third", "run")], [], "Header.")


def test_footer_has_the_names_of_the_file(package: str) -> None:
    roots = [Place(f"{package}.{module}", "helper") for module in ("first", "second")]

    def write_table(names: Any) -> str:
        return "FOUND = [" + ", ".join(names[root] for root in roots) + "]"

    contents = execute(generate_source(roots, [], "Header.", write_table))
    assert [helper(2) for helper in contents["FOUND"]] == [4.0, -2]


def test_modules_that_import_each_other_are_sorted(package: str, tmp_path: Path) -> None:
    one = "from .two import BASE\n\nHALF = BASE / 2\n\n\nclass One:\n    half = HALF\n"
    two = "from .one import One\n\nBASE = 4\n\n\ndef make() -> One:\n    return One()\n"
    for name, text in (("one", one), ("two", two)):
        (tmp_path / package / f"{name}.py").write_text(
            f"from __future__ import annotations\n\n{text}"
        )
    text = generate_source([Place(f"{package}.two", "make")], [], "Header.")
    assert execute(text)["make"]().half == 2.0
