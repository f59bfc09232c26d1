"""Load tokenizers and models of the transformers library: no code of theirs runs, and a local folder asks no hub."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ddiff.errors import DataError, DdiffError

Loaded = TypeVar("Loaded")
_log = logging.getLogger(__name__)

# What reads a vocabulary file that is not the tokenizer.json of a fast tokenizer: ending -> package.
_READERS = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
_REQUIRED = re.compile(
    r"(?:requires? (?:the )?|`)([A-Za-z][\w-]+)`?(?: library)?(?:,? is required| but it was not)"
)
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_pretrained(
    load: Callable[..., Loaded], source: str, what: str, *, name: str | None = None, **options: Any
) -> Loaded:
    """Call a `from_pretrained` of the transformers library on a local folder or the name of a repository on the hub.

    Code that a repository brings along (`auto_map`) is never run, nor is it asked on the terminal whether to. A local
    folder is read without any request. `what` is what is loaded ("tokenizer", "model"), for messages; `name` takes the
    place of the source there. DataError, with the cause, for whatever cannot be loaded.
    """
    shown = name or source
    is_local = is_folder(source)
    if not is_local:
        _check_hub_name(source, shown, what)
    try:
        loaded = load(source, trust_remote_code=False, local_files_only=is_local, **options)
    except Exception as error:  # every file format behind it has errors of its own
        if isinstance(error, DdiffError):
            raise
        raise _explained(error, source, shown, what, is_local) from error
    if getattr(getattr(loaded, "config", None), "auto_map", None):
        _log.warning(
            "%s names Python code of its own (auto_map), which is not run; the library's own %s is taken in its place.",
            shown,
            type(loaded).__name__,
        )
    return loaded


def code_refused(shown: str, what: str) -> DataError:
    """The error for a repository whose tokenizer or model is defined by Python code of its own."""
    return DataError(
        f"No {what} from {shown!r}: it names Python code of its own (auto_map), and ddiff runs no code of a tokenizer or "
        f"model (trust_remote_code is always False). What is needed is one of a class that the transformers library "
        f"itself has: load it where you trust its code, save it as such a class, and name that folder."
    )


def is_folder(source: str) -> bool:
    """Whether a text names a folder of this machine; an empty one, which is the working directory to pathlib, does not."""
    return bool(source.strip()) and Path(source).is_dir()


def is_place(source: str) -> bool:
    """Whether a text can only be meant as a place on this machine: names on the hub are NAME or OWNER/NAME."""
    return (
        not source.strip()
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with its type where that says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return (
        lines[0]
        if isinstance(error, OSError | ValueError)
        else f"{type(error).__name__}: {lines[0]}"
    )


def _check_hub_name(source: str, shown: str, what: str) -> None:
    """Raise DataError for what can only be meant as a place on this machine, so that no hub is asked for it."""
    path = Path(source)
    if path.is_file():
        raise DataError(
            f"No {what} from {shown!r}: it is a file, and the folder that it is in is due. Name {str(path.parent)!r}."
        )
    if is_place(source):
        raise DataError(
            f"No {what} from {shown!r}: there is no such folder, and it is no name on the hub (NAME or OWNER/NAME). Check "
            "the path; it is relative to where ddiff runs."
        )


def _explained(error: Exception, source: str, shown: str, what: str, is_local: bool) -> DataError:
    if "trust_remote_code" in str(error):
        return code_refused(shown, what)
    folder = Path(source)
    package = _missing_package(error, folder, what, is_local)
    if package is not None:
        return DataError(
            f"No {what} from {shown!r}: reading it needs the package {package}, which is not installed here. Run `pip "
            f"install {package}`, or save the {what} as a fast tokenizer (tokenizer.json) where it is."
        )
    if is_local and (damaged := _damaged_file(folder)) is not None:
        return DataError(
            f"No {what} from {shown!r}: its file {damaged[0]} is damaged ({damaged[1]}). Copy or download it again."
        )
    said = first_line(error)
    if not is_local:
        return DataError(
            f"No {what} from {shown!r}. It is no local directory, and the hub did not give it: without a connection, fetch "
            f"the {what} on a machine that has one and name the directory. ({said})"
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if what == "model" and pickled and not list(folder.glob("*.safetensors")):
        return DataError(
            f"No {what} from {shown!r}: its weights {pickled[0]} are damaged, or hold more than tensors, which is not "
            f"loaded because it can run code ({said}). Save the model with safetensors where you trust it, and name that "
            "folder."
        )
    return DataError(
        f"No {what} from {shown!r}. That directory holds no {what} that can be read. ({said})"
    )


def _missing_package(error: Exception, folder: Path, what: str, is_local: bool) -> str | None:
    """The package that is missing, by the vocabulary files of a folder; else by what the library says."""
    if what == "tokenizer" and is_local and not (folder / "tokenizer.json").exists():
        for file in sorted(folder.iterdir()):
            # tiktoken.model is what the library calls the file of a tiktoken vocabulary
            package = "tiktoken" if file.name == "tiktoken.model" else _READERS.get(file.suffix)
            if package is not None and importlib.util.find_spec(package) is None:
                return package
        return None
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name
    found = _REQUIRED.search(str(error))
    if found is None or importlib.util.find_spec(found[1].replace("-", "_").lower()) is not None:
        return None
    return found[1].lower()


def _damaged_file(folder: Path) -> tuple[str, str] | None:
    """The first JSON or safetensors file of a folder that is not whole, and why."""
    for file in sorted(folder.glob("*.json")):
        if file.is_dir():
            return file.name, "it is a folder"
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            return file.name, first_line(error)
        if not isinstance(content, dict):
            return file.name, f"it holds a {type(content).__name__} where an object is due"
    for file in sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        try:
            with safe_open(file, "np"):
                pass
        except Exception as error:
            return file.name, first_line(error)
    return None
