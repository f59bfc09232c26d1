"""Python source of the standard library, a corpus that every machine with Python has."""

from __future__ import annotations

import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ddiff.data.documents import Documents, documents_from_texts, split_documents
from ddiff.errors import DataError

# Tables of characters, plain text, and packages that newer versions of Python lack.
LEFT_OUT = frozenset({"distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"})
# Folders of tests in any package.
TESTS = frozenset({"test", "tests", "idle_test"})


def read_standard_library(*, held_out: float = 0.05, folder: Path | None = None) -> Documents:
    """Read the Python source of the standard library, one document per module.

    Packages of tests and the packages in `LEFT_OUT` are left out.

    Args:
        held_out: fraction of the modules for validation, chosen by the hash of the text.
        folder: folder of the library; None: that of the running Python.

    Raises DataError if the folder has no Python source.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    names = []
    texts = []
    for path in _find_modules(folder):
        # `tokenize.open` obeys the line that declares the encoding of a module.
        with tokenize.open(path) as file:
            text = file.read()
        if text.strip():
            names.append(path.relative_to(folder).as_posix())
            texts.append(text)
    if not texts:
        raise DataError(
            f"read_standard_library: {folder} has no Python source (.py), because this Python "
            'stores its library in another form. Name other files with [data] kind = "text".'
        )
    return split_documents(documents_from_texts(texts, names), held_out, "by module")


def _find_modules(folder: Path) -> Iterator[Path]:
    """Yield the modules of the library, sorted by path."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        # The folder also holds installed packages and files about the build of this machine.
        is_module = parts[0] in sys.stdlib_module_names and parts[0] not in LEFT_OUT
        if is_module and not TESTS & set(parts):
            yield path
