"""Write the package of a new plugin from a template: `ddiff new plugin NAME --kind KIND`.

A template is a folder of ordinary files, in which the names of the plugin are placeholders. The
placeholders are valid Python names. `templates/common` has the files of every package, and
`templates/KIND` has the component of a kind, its test and its recipe.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

from ddiff.atomic import partial_name
from ddiff.errors import ArgumentError, shorten, suggest
from ddiff.plugin.loader import find_installed_plugins, survey_plugins
from ddiff.plugin.registry import KINDS

COMMON = "common"
SYNONYMS = {"metric": "judge", "field": "fields_dataset"}
"""Other names of kinds: a metric of samples is a judge, and new fields come with their data set."""

LONGEST_NAME = 40  # characters
_NAME = re.compile(r"[a-z](_?[a-z0-9])*")
# The placeholders of templates. Each is a name that no other text of a template contains.
_PACKAGE = "ddiff_plugin_name"
_DISTRIBUTION = "ddiff-plugin-name"
_COMPONENT = "plugin_name"
_KIND = "plugin_kind"
_CLASS = "PluginName"


def find_templates() -> dict[str, Path]:
    """Return the folders of the templates by kind, in the order of the kinds."""
    package = Path(__file__).parents[1]
    # templates are inside the package in a wheel, and next to the package in a checkout
    folder = package / "_templates"
    if not folder.is_dir():
        folder = package.parent / "templates"
    return {kind: folder / kind for kind in KINDS if (folder / kind).is_dir()}


def list_kinds() -> str:
    """Return the kinds of plugins that can be written, as text for help and messages."""
    synonyms = {kind: other for other, kind in SYNONYMS.items()}
    names = [
        f"{kind} (or {synonyms[kind]})" if kind in synonyms else kind for kind in find_templates()
    ]
    return ", ".join(names)


def write_package(name: str, kind: str, folder: Path | None = None) -> Path:
    """Write the package of a new plugin with one component, and return its folder.

    The folder is written completely or not at all.

    Args:
        name: name of the plugin and of its component, such as "ising".
        kind: kind of the component, or one of `SYNONYMS`.
        folder: new or empty folder; by default ddiff-NAME in the working directory, with - for _.

    Raises ArgumentError for an unknown kind, an invalid or used name, and a folder with files.
    """
    kind = _check_kind(kind)
    _check_name(name, kind)
    texts = _read_texts(kind)
    _check_class(name, texts)
    target = folder or Path(_replace(_DISTRIBUTION, name, kind))
    _check_folder(target)
    partial = target.with_name(partial_name(target.name))
    try:
        for place, text in texts.items():
            path = partial / _replace(place, name, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_replace(text, name, kind), encoding="utf-8")
        # replaces an empty folder, and fails for a folder that was filled in the meantime
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_kind(kind: str) -> str:
    """Return the kind in the registry. Raises ArgumentError if it has no template."""
    templates = find_templates()
    known = SYNONYMS.get(kind, kind)
    if known in templates:
        return known
    if known in KINDS:
        raise ArgumentError(
            f'ddiff new plugin: there is no template for the kind "{known}", because a short class '
            f'is enough. The section "{known}" of docs/plugins.md (docs/plugins.md#{known}) has a '
            'complete example, and "Parts of a plugin" on the same page shows how to register it. '
            f"Kinds with templates: {list_kinds()}."
        )
    raise ArgumentError(
        f'ddiff new plugin: there is no kind of plugin "{shorten(kind)}".'
        f"{suggest(kind, [*templates, *SYNONYMS])} Kinds with templates: {list_kinds()}."
    )


def _check_name(name: str, kind: str) -> None:
    """Raise ArgumentError for a name that is invalid, or is used by an installed plugin."""
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ArgumentError(
            f"ddiff new plugin: NAME must be lower-case letters, digits and single underscores, "
            f"begin with a letter and have at most {LONGEST_NAME} characters; got "
            f'"{shorten(name)}". An example is "ising", for the package ddiff_ising.'
        )
    if name in find_installed_plugins():
        raise ArgumentError(
            f'ddiff new plugin: NAME must be new; a plugin "{name}" is installed already. Choose '
            "another name, or uninstall that plugin."
        )
    for component in survey_plugins().registry.components(kind):
        if component.name == name:
            raise ArgumentError(
                f"ddiff new plugin: NAME must be new; there is a {component} already. Choose "
                "another name."
            )
    package = _replace(_PACKAGE, name, kind)
    if importlib.util.find_spec(package) is not None:
        raise ArgumentError(
            f"ddiff new plugin: NAME must be new; a Python package {package} exists already. "
            "Choose another name."
        )


def _check_class(name: str, texts: dict[str, str]) -> None:
    """Raise ArgumentError if the class of the component would have the name of another object."""
    own = _replace(_CLASS, name, "")
    for text in texts.values():
        if re.search(rf"\b{own}\b", text):
            raise ArgumentError(
                f'ddiff new plugin: NAME must give a new class; "{name}" gives the class {own}, '
                "which the package uses already. Choose another name."
            )


def _check_folder(target: Path) -> None:
    """Raise ArgumentError unless a folder is new or empty."""
    if not target.parent.is_dir():
        raise ArgumentError(
            f"ddiff new plugin: the folder {target} must be in an existing folder; there is no "
            f"folder {target.parent}. Create it first, or choose another with --folder."
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArgumentError(
            f"ddiff new plugin: the package needs a new or empty folder; {target} is a file or a "
            "link. Choose another folder with --folder, or remove it."
        )
    if target.is_dir() and any(target.iterdir()):
        raise ArgumentError(
            f"ddiff new plugin: the package needs a new or empty folder; {target} has files. "
            "Choose another folder with --folder, or empty it."
        )


def _read_texts(kind: str) -> dict[str, str]:
    """Return the texts of the template of a kind, by their relative paths."""
    own = find_templates()[kind]
    texts = {}
    for folder in (own.with_name(COMMON), own):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(folder).as_posix()
                texts[place] = path.read_text(encoding="utf-8")
    return texts


def _replace(text: str, name: str, kind: str) -> str:
    """Replace the placeholders of a template by the names of a plugin."""
    words = [word.capitalize() for word in name.split("_")]
    text = text.replace(_DISTRIBUTION, f"ddiff-{name.replace('_', '-')}")
    text = text.replace(_COMPONENT, name)
    text = text.replace(_CLASS, "".join(words))
    return text.replace(_KIND, kind)
