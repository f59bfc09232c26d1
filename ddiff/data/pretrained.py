"""Load tokenizers and models of the transformers library safely.

Code that comes with a repository never runs, and loading a local folder makes no request.
"""

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

# Package that reads a vocabulary file other than the tokenizer.json of a fast tokenizer, by ending.
_READERS = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
_REQUIRED = re.compile(
    r"(?:requires? (?:the )?|`)([A-Za-z][\w-]+)`?(?: library)?(?:,? is required| but it was not)"
)
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_pretrained(
    load: Callable[..., Loaded], source: str, what: str, *, name: str | None = None, **options: Any
) -> Loaded:
    """Call a `from_pretrained` of the transformers library on a local folder or hub name.

    Code of the repository (`auto_map`) is never run, and no prompt offers to run it. A local folder
    is read without any request. `what` ("tokenizer", "model") is for messages, where `name`
    replaces the source. Raises DataError with the cause of any failure.
    """
    shown = name or source
    is_local = is_folder(source)
    if not is_local:
        _check_hub_name(source, shown, what)
    try:
        loaded = load(source, trust_remote_code=False, local_files_only=is_local, **options)
    except DdiffError:
        raise
    except Exception as error:  # each file format has different error classes
        raise _explain(error, source, shown, what, is_local) from error
    if what == "model":
        _warn_of_custom_code(loaded, shown)
    return loaded


def _warn_of_custom_code(loaded: Any, shown: str) -> None:
    """Warn if the library's class replaces the repository's own."""
    from transformers import PreTrainedModel  # slow to import, but loading a model has imported it

    if isinstance(loaded, PreTrainedModel) and loaded.config.to_dict().get("auto_map"):
        _log.warning(
            "%s names its own Python code (auto_map), which is not run; the library's own %s is "
            "taken in its place.",
            shown,
            type(loaded).__name__,
        )


def custom_code_error(shown: str, what: str) -> DataError:
    """Return the error for a repository that defines its tokenizer or model by Python code."""
    return DataError(
        f"No {what} from {shown!r}: it names its own Python code (auto_map), and ddiff runs no "
        "code of a tokenizer or model (trust_remote_code is always False). What is needed is one "
        "of a class that the transformers library itself has: load it on a machine where you trust "
        "its code, save it as such a class, and name that folder."
    )


def is_folder(source: str) -> bool:
    """Return whether a text names a folder of this machine."""
    # pathlib takes an empty text for the working directory.
    return bool(source.strip()) and Path(source).is_dir()


def is_local_path(source: str) -> bool:
    """Return whether a text can only be a local path."""
    # Names on the hub are NAME or OWNER/NAME.
    return (
        not source.strip()
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error, after its class if that is needed."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, OSError | ValueError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


def _check_hub_name(source: str, shown: str, what: str) -> None:
    """Raise DataError for a local path, before the hub is asked for it."""
    path = Path(source)
    if path.is_file():
        raise DataError(
            f"No {what} from {shown!r}: it is a file, but the folder that contains it is expected. "
            f"Name {str(path.parent)!r}."
        )
    if is_local_path(source):
        raise DataError(
            f"No {what} from {shown!r}: there is no such folder, and it is not a name on the hub "
            "(NAME or OWNER/NAME). Check the path; it is relative to where ddiff runs."
        )


def _explain(error: Exception, source: str, shown: str, what: str, is_local: bool) -> DataError:
    """Find the cause of a failed load and return the error that names it."""
    if "trust_remote_code" in str(error):
        return custom_code_error(shown, what)
    package = _missing_package(error, Path(source), what, is_local)
    if package is not None:
        return DataError(
            f"No {what} from {shown!r}: reading it needs the package {package}, which is not "
            f"installed here. Run `pip install {package}`, or save the {what} as a fast tokenizer "
            "(tokenizer.json) in that place."
        )
    if is_local:
        return _explain_local(error, Path(source), shown, what)
    return DataError(
        f"No {what} from {shown!r}. It is not a local directory, and the hub did not give it: "
        f"without a connection, fetch the {what} on a machine that has one and name the directory. "
        f"({first_line(error)})"
    )


def _explain_local(error: Exception, folder: Path, shown: str, what: str) -> DataError:
    damaged = _damaged_file(folder)
    if damaged is not None:
        return DataError(
            f"No {what} from {shown!r}: its file {damaged[0]} is damaged ({damaged[1]}). Copy or "
            "download it again."
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if what == "model" and pickled and not list(folder.glob("*.safetensors")):
        return DataError(
            f"No {what} from {shown!r}: its weights {pickled[0]} are damaged, or hold more than "
            f"tensors, which is not loaded because it can run code ({first_line(error)}). Load the "
            "model on a machine where you trust it, save it with safetensors, and name that folder."
        )
    return DataError(
        f"No {what} from {shown!r}. That directory holds no {what} that can be read. "
        f"({first_line(error)})"
    )


def _missing_package(error: Exception, folder: Path, what: str, is_local: bool) -> str | None:
    """Return the missing package, by the vocabulary files of a folder or the library's message."""
    if what == "tokenizer" and is_local and not (folder / "tokenizer.json").exists():
        for file in sorted(folder.iterdir()):
            # The ending .model would mean sentencepiece, but this name is that of tiktoken.
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
    """Return the first damaged JSON or safetensors file of a folder, and the reason."""
    for file in sorted(folder.glob("*.json")):
        if file.is_dir():
            return file.name, "it is a folder"
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            return file.name, first_line(error)
        if not isinstance(content, dict):
            return file.name, f"it holds a {type(content).__name__} instead of an object"
    for file in sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        try:
            with safe_open(file, "np"):
                pass
        except Exception as error:
            return file.name, first_line(error)
    return None
