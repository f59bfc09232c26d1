"""Find and read the files of recipes.

A recipe is given by a path, by the name of a shipped recipe, or by an fsspec address.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ddiff.errors import RecipeError, shorten, suggest

LARGEST_FILE = 2**20  # bytes of a recipe; shipped recipes have about two thousand


class RecipeFile(NamedTuple):
    """Text of a recipe and the file that contains the text.

    Args:
        text: TOML text.
        source: path or address of the file, for messages.
    """

    text: str
    source: str

    @property
    def identity(self) -> str:
        """Absolute path or address of the file, which is equal for `a.toml` and `./a.toml`."""
        return self.source if "://" in self.source else str(Path(self.source).resolve())


def read_file(name: str, extended_by: str = "", place: str = "") -> RecipeFile:
    """Read the file of a recipe. Raises RecipeError if there is no such file.

    Args:
        name: path, name of a shipped recipe, or fsspec address. A file takes precedence over a
            shipped recipe of the same name.
        extended_by: file of the recipe that extends this recipe. A path that is relative to its
            folder takes precedence over a path that is relative to the working directory.
        place: text at the beginning of an error message, such as "a.toml:1: extends ".
    """
    if extended_by and "://" not in extended_by:
        neighbour = Path(extended_by).parent / name
        if _is_file(neighbour):
            name = str(neighbour)
    if "://" in name:
        return RecipeFile(_read_text(name, name, place), name)
    if _is_file(Path(name)):
        return RecipeFile(_read_text(Path(name), name, place), str(Path(name)))
    shipped = find_shipped_recipes()
    if name in shipped:
        path = _shorten_path(shipped[name])
        return RecipeFile(_read_text(path, name, place), str(path))
    raise RecipeError(_explain_missing(name, place, shipped))


def find_shipped_recipes() -> dict[str, Path]:
    """Return the paths of the shipped recipes by name, recipes in sub-folders last.

    The name of a recipe in a sub-folder contains the folder, as in `paper/<name>`.
    """
    package = Path(__file__).parents[1]
    # recipes are inside the package in a wheel, and next to the package in a checkout
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    paths = sorted(folder.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _read_text(source: Path | str, name: str, place: str) -> str:
    """Read the text of a local path or, if `source` is a string, of an fsspec address.

    Args:
        source: path or address.
        name: name of the recipe as the user wrote it, for messages.
        place: text at the beginning of an error message.
    """
    try:
        content = _read_local(source) if isinstance(source, Path) else _read_remote(source)
        # "utf-8-sig" skips a byte order mark, which some editors write
        return content.decode("utf-8-sig")
    # ValueError: bytes that are not UTF-8, or an unknown protocol
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"{place}{shorten(name)}: this recipe cannot be read: {shorten(str(error))}. Give the "
            "path of a readable TOML file."
        ) from error


def _read_local(path: Path) -> bytes:
    # one byte more than allowed shows that a file is too large without reading all of it
    with path.open("rb") as file:
        return _check_size(file.read(LARGEST_FILE + 1))


def _read_remote(address: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return _check_size(file.read(LARGEST_FILE + 1))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each fsspec protocol raises exception classes of its own library
        raise OSError(f"{type(error).__name__}: {error}") from error


def _check_size(content: bytes) -> bytes:
    if len(content) > LARGEST_FILE:
        raise ValueError(f"the file has more than {LARGEST_FILE:,} bytes, the limit for a recipe")
    return content


def _explain_missing(name: str, place: str, shipped: dict[str, Path]) -> str:
    if _is_dir(Path(name)):
        what = "is a directory, not a recipe file"
    else:
        what = "there is no such file and no shipped recipe of that name"
    suggestion = suggest(PurePosixPath(name).stem, shipped)
    if not suggestion:
        suggestion = suggest(name.removesuffix(".toml"), shipped)
    # the many recipes in sub-folders are only counted
    listed = [shipped_name for shipped_name in shipped if "/" not in shipped_name]
    more = f"; all {len(shipped)}: ddiff recipes" if len(listed) < len(shipped) else ""
    return (
        f"{place}{shorten(name)}: {what}.{suggestion} Shipped recipes: "
        f"{', '.join(listed) or 'none'}{more}."
    )


def _is_file(path: Path) -> bool:
    # `Path.is_file` raises for names that are not valid file names
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _shorten_path(path: Path) -> Path:
    """Make a path relative to the working directory if possible, for short messages."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
