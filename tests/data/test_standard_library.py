"""Python source of the standard library as a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from ddiff_core.data import StandardLibrary

from ddiff.data.standard_library import read_standard_library
from ddiff.errors import DataError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Folder in the form of a standard library, with 40 modules that count."""
    for number in range(40):
        write(tmp_path, f"json/part{number}.py", f"x = {number}\n")
    for left_out in (
        "_sysconfigdata__linux.py",
        "encodings/cp437.py",
        "json/tests/test_json.py",
        "site-packages/numpy/core.py",
        "test/test_re.py",
    ):
        write(tmp_path, left_out, "secret = 1\n")
    write(tmp_path, "json/__init__.py", "\n")
    return tmp_path


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def test_standard_library_leaves_out_tests_packages_and_blank_modules(library: Path) -> None:
    documents = read_standard_library(folder=library, held_out=0.3)
    texts = documents.train["text"][:] + documents.validation["text"][:]
    assert sorted(texts) == sorted(f"x = {number}\n" for number in range(40))
    assert "json/part0.py" in documents.train["name"][:] + documents.validation["name"][:]


def test_standard_library_obeys_the_declared_encoding_of_a_module(library: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    write(library, "ast.py", text, "latin-1")
    documents = read_standard_library(folder=library, held_out=0.3)
    assert text in documents.train["text"][:] + documents.validation["text"][:]


def test_standard_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no Python source.*kind = \"text\""):
        read_standard_library(folder=tmp_path)


def test_standard_library_component_reads_the_running_python() -> None:
    config = StandardLibrary.Config(held_out=0.05)
    documents = StandardLibrary.build(config, length=64, seed=0, cache=None)
    names = documents.train["name"][:] + documents.validation["name"][:]
    assert {"json/decoder.py", "textwrap.py"} <= set(names)
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)
