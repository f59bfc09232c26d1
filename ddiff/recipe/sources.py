"""Find and read recipe files, and merge each recipe with the recipe that its `extends` names.

A recipe is given by a path, by the name of a shipped recipe, or by an fsspec address.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ddiff.errors import RecipeError, shorten, suggest
from ddiff.recipe.messages import format_value
from ddiff.recipe.schema import SLOTS, TABLES
from ddiff.recipe.toml import RecipeTree, read_toml

LONGEST_CHAIN = 32  # recipes, each of which extends the next
LARGEST_FILE = 2**20  # bytes of a recipe; shipped recipes have about two thousand


def find_shipped_recipes() -> dict[str, Path]:
    """Return the paths of the shipped recipes by name.

    The name of a recipe in a sub-folder contains the folder, as in `paper/<name>`.
    """
    package = Path(__file__).parents[1]
    # recipes are inside the package in a wheel, and next to the package in a checkout
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
    }


def read_tree(name: str, place: str = "") -> RecipeTree:
    """Read a recipe file or shipped recipe, and expand the names of components to tables.

    Args:
        name: path, name of a shipped recipe, or fsspec address.
        place: file and line that contain `name`, for the beginning of an error message.
    """
    return expand_shorthand(read_toml(*_read_text(name, place)))


def merge_bases(tree: RecipeTree, chain: tuple[str, ...] = ()) -> RecipeTree:
    """Merge a recipe over the recipe that it extends, recursively.

    Args:
        tree: the recipe.
        chain: files of the recipes that extend `tree`, directly or indirectly.

    Raises RecipeError if the recipes form a cycle.
    """
    if "extends" not in tree.values:
        return tree
    place = tree.locate(("extends",))
    # removed, because `resolve` refuses a tree that still has the key, which settings may add
    name = tree.values.pop("extends")
    if not isinstance(name, str):
        raise RecipeError(
            f"{place}: extends must be the path or name of one recipe, in quotes; got "
            f"{format_value(name)}."
        )
    chain = (*chain, tree.source)
    if len(chain) > LONGEST_CHAIN:
        raise RecipeError(
            f"{place}: a chain of extends has more than {LONGEST_CHAIN} recipes: {chain[0]} -> "
            f"{chain[1]} -> ... -> {shorten(name)}. Merge the tables of several recipes into one "
            "file."
        )
    base = read_tree(_resolve_base(name, tree.source), f"{place}: extends ")
    # compare real paths, so that ./a.toml and a.toml are equal
    if _identity(base.source) in [_identity(source) for source in chain]:
        raise RecipeError(
            f"{place}: recipes extend each other in a cycle: "
            f"{' -> '.join((*chain, base.source))}. Remove the key extends from one of these files."
        )
    places = {
        path: f"{written} (extended by {tree.source})" for path, written in base.places.items()
    }
    base = RecipeTree(base.values, base.source, places)
    return tree.merge_over(merge_bases(base, chain), inherited_keys)


def expand_shorthand(tree: RecipeTree) -> RecipeTree:
    """Replace names of components by tables, such as "muon" by `{kind = "muon"}`."""
    for path in SLOTS:
        table: Any = tree.values
        for key in path[:-1]:
            table = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(table.get(path[-1]), str):
            table[path[-1]] = {"kind": table[path[-1]]}
    return tree


def inherited_keys(
    path: tuple[str, ...], base: Mapping[str, Any], new: Mapping[str, Any]
) -> frozenset[str] | None:
    """Return the keys of a base table that an overriding table inherits; None: all keys.

    If the two tables have different kinds, only keys of the engine are inherited, because each kind
    has different keys.
    """
    if path not in SLOTS or "kind" not in new:
        return None
    if new["kind"] == base.get("kind", SLOTS[path].default):
        return None
    return frozenset(TABLES[path[0]].engine_keys()) if len(path) == 1 else frozenset()


# ---------------------------------------------------------------------- files


def _read_text(name: str, place: str) -> tuple[str, str]:
    """Return the text of a recipe and the name of its file."""
    is_remote = "://" in name
    source = name
    # a file takes precedence over a shipped recipe of the same name
    if not is_remote and not _is_file(Path(name)):
        shipped = find_shipped_recipes()
        if name not in shipped:
            raise RecipeError(_explain_missing(name, place, shipped))
        source = str(_shorten_path(shipped[name]))
    try:
        # "utf-8-sig" skips a byte order mark, which some editors write
        content = _read_remote(name) if is_remote else _read_local(Path(source))
        text = content.decode("utf-8-sig")
    # ValueError: bytes that are not UTF-8, or an unknown protocol
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"{place}{shorten(name)}: this recipe cannot be read: {shorten(str(error))}. Give the "
            "path of a readable TOML file."
        ) from error
    return text, source if is_remote else str(Path(source))


def _read_local(path: Path) -> bytes:
    # one byte more than allowed shows that a file is too large without reading all of it
    with path.open("rb") as file:
        return _check_size(file.read(LARGEST_FILE + 1))


def _read_remote(name: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(name, "rb") as file:
            return _check_size(file.read(LARGEST_FILE + 1))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each fsspec protocol raises exception classes of its own library
        raise OSError(f"{type(error).__name__}: {error}") from error


def _check_size(content: bytes) -> bytes:
    if len(content) > LARGEST_FILE:
        raise ValueError(f"the file has more than {LARGEST_FILE:,} bytes, the limit for a recipe")
    return content


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


def _explain_missing(name: str, place: str, shipped: Mapping[str, Path]) -> str:
    suggestion = suggest(PurePosixPath(name).stem, shipped)
    if not suggestion:
        suggestion = suggest(name.removesuffix(".toml"), shipped)
    if _is_dir(Path(name)):
        what = "is a directory, not a recipe file"
    else:
        what = "there is no such file and no shipped recipe of that name"
    # the many recipes in sub-folders are only counted
    listed = [shipped_name for shipped_name in shipped if "/" not in shipped_name]
    more = f"; all {len(shipped)}: ddiff recipes" if len(listed) < len(shipped) else ""
    return (
        f"{place}{shorten(name)}: {what}.{suggestion} Shipped recipes: "
        f"{', '.join(listed) or 'none'}{more}."
    )


def _shorten_path(path: Path) -> Path:
    """Make a path relative to the working directory if possible, for short messages."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _resolve_base(name: str, source: str) -> str:
    """Return the path of a base recipe, relative to the extending file if that path exists."""
    neighbour = Path(source).parent / name
    return str(neighbour) if "://" not in source and _is_file(neighbour) else name


def _identity(source: str) -> str:
    return source if "://" in source else str(Path(source).resolve())
