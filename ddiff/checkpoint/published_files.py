"""Files of a published checkpoint: configuration, weights and tokenizer.

Files are read as data: no Python code of a repository and no pickled object other than tensors,
numbers and containers is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ddiff.checkpoint.atomic_folder import BLOCK, FileDigest
from ddiff.checkpoint.moving_average import align_average
from ddiff.checkpoint.published_tensors import PublishedTensors
from ddiff.data.pretrained import first_line
from ddiff.errors import DataError
from ddiff.progress import show_activity

CONFIGS = ("config.json", "config.yaml", ".hydra/config.yaml")
"""Names of the configuration, the preferred one first."""

WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoint.pth",
    "checkpoints-meta/checkpoint.pth",
    "last.ckpt",
    "checkpoints/last.ckpt",
)
"""Names of the weights, the preferred one first."""

SUFFIXES = (".safetensors", ".bin", ".pth", ".ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")
HUB = "hf://"
"""Beginning of the name of a model on the hub."""

_HUB_NAME = re.compile(rf"(?:{HUB})?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_TEXTS = ["*.json", "*.jsonl", "*.yaml", "*.toml", "*.txt", "*.model", "*.jinja"]
_MISSING: Any = object()


@dataclass(frozen=True)
class PublishedFiles:
    """Opened files of a published checkpoint.

    Attributes:
        source: folder, file or hub name as the user wrote it.
        directory: local folder of the files.
        config: configuration as nested mappings.
        tensors: tensors of the weights, read when they are taken.
        digests: size and SHA-256 of every file that was read, by name in the folder.
        tokenizer_directory: `directory` if it has the files of a tokenizer, else None.
        step: number of training steps, if the weights record it.
        is_average: whether `tensors` are exponential moving averages that a training checkpoint
            stores next to the weights.
        revision: commit of the repository on the hub; None for local files.
    """

    source: str
    directory: Path
    config: Mapping[str, Any]
    tensors: PublishedTensors
    digests: Mapping[str, FileDigest]
    tokenizer_directory: Path | None = None
    step: int | None = None
    is_average: bool = False
    revision: str | None = None

    def read_value(self, key: str) -> Any:
        """Return the value of a dotted key of the configuration.

        Raises DataError if the key is missing.
        """
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, _MISSING) if _is_mapping(value) else _MISSING
        if value is _MISSING:
            raise DataError(
                f"{self.source}: the configuration has no key {key}, which this layout needs. Use "
                "the configuration that was published with the weights."
            )
        return value

    def read_count(self, key: str) -> int:
        """Return a positive integer of the configuration. Raises DataError for another value."""
        value = self.read_value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(
                f"{self.source}: the key {key} must be a positive integer; got {value!r}. Use the "
                "configuration that was published with the weights."
            )
        return value


def open_published(source: str | Path | Location) -> PublishedFiles:
    """Open a published checkpoint.

    `source`: a local folder, a file of weights, a name on the hub, or the result of `locate`.
    Raises DataError, which names the file, if a file is missing, incomplete, damaged, or has
    pickled objects that could run code.
    """
    location = source if isinstance(source, Location) else locate(source)
    name = location.source
    directory = location.directory
    weights = _read_weights(directory, location.weights_file, name)
    config, config_files = _read_config(directory, weights)
    with show_activity("computing the SHA-256 of the files"):
        digests = {
            str(file.relative_to(directory)): location.digest(file)
            for file in [*config_files, *weights.files]
        }
    has_tokenizer = any(any(directory.glob(pattern)) for pattern in _TOKENIZERS)
    return PublishedFiles(
        source=name,
        directory=directory,
        config=config,
        tensors=weights.tensors,
        digests=digests,
        tokenizer_directory=directory if has_tokenizer else None,
        step=weights.step,
        is_average=weights.is_average,
        revision=location.revision,
    )


# ---------------------------------------------------------------------- location


@dataclass(frozen=True)
class Location:
    """Local folder of a published checkpoint.

    Attributes:
        source: folder, file or hub name as the user wrote it.
        directory: local folder of the files.
        weights_file: file of weights that `source` names; None if it names a folder.
        revision: commit of the repository on the hub; None for local files.
        digests: known digests of files, by name in the folder.
    """

    source: str
    directory: Path
    weights_file: Path | None = None
    revision: str | None = None
    digests: Mapping[str, FileDigest] = field(default_factory=dict)

    def digest(self, file: Path) -> FileDigest:
        """Return size and SHA-256 of a file of the folder; computed if they are not known."""
        known = self.digests.get(file.relative_to(self.directory).as_posix())
        return compute_digest(file) if known is None else known


def locate(source: str | Path) -> Location:
    """Return the local folder of a published checkpoint; a hub name is downloaded first.

    `source`: a local folder, a file of weights, or a name on the hub, `OWNER/NAME`,
    `OWNER/NAME@REVISION` or the same after `hf://`. A local path is preferred to a hub name. Raises
    DataError if it is none of these, or if the download fails.
    """
    source = str(source)
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():
        return Location(source, path)
    if source.strip() and path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{source} is not a file of weights: its name must end in {', '.join(SUFFIXES)}. "
                "Name the folder of the checkpoint or its file of weights."
            )
        return Location(source, path.parent, path)
    named = _HUB_NAME.fullmatch(source)
    if named is None or source.startswith((".", "/", "~")):
        raise DataError(
            f"No checkpoint {source!r}: there is no such folder or file, and it is not a name on "
            "the hub (OWNER/NAME). Check the path; relative paths start in the working directory."
        )
    folder = _download(named[1], named[2])
    return Location(source, folder, revision=folder.name)


def _download(name: str, revision: str | None) -> Path:
    """Download the data files of a repository on the hub, and return their folder.

    The name of the folder is the commit. Python files are not downloaded.
    """
    # Imported here, because only this function needs the network.
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch([*_TEXTS, "*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            # Second, so that weights in two formats are downloaded once.
            folder = fetch([*_TEXTS, "*.bin", "*.pth", "*.ckpt"])
    except Exception as error:  # the library has many error classes
        raise DataError(
            f"{name!r} cannot be downloaded from the hub ({first_line(error)}). It is not a local "
            "folder either. Check the name and the connection, or download the files on another "
            "machine and name their folder."
        ) from error
    return folder


# ---------------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Weights:
    """Tensors of a checkpoint, and the files that contain them.

    `metadata`: texts in the header of a safetensors file.
    """

    tensors: PublishedTensors
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    step: int | None = None
    is_average: bool = False


def _read_weights(directory: Path, file: Path | None, source: str) -> _Weights:
    """Open the weights in a folder, or the given file of weights."""
    if file is None:
        file = _find_weights(directory, source)
    if file.name.endswith(".index.json"):
        return _open_shards(file, source)
    if file.suffix == ".safetensors":
        return _open_safetensors([file], source)
    return _open_pickled(file, source)


def _find_weights(directory: Path, source: str) -> Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    # Training checkpoints have the step in their names.
    found = sorted(directory.glob("*.ckpt")) + sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise DataError(
            f"{source} has {len(found)} files of weights ({names}). Name one of these files."
        )
    raise DataError(
        f"{source} is not a checkpoint: the folder has no weights. Expected one of "
        f"{', '.join(WEIGHTS[:4])}, or a .ckpt file. Name the folder that has these files."
    )


def _open_safetensors(files: list[Path], source: str) -> _Weights:
    """Open safetensors files. Their tensors are read when they are needed."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            reader = safe_open(file, "pt")
            metadata |= reader.metadata() or {}
            names = reader.keys()
            for name in names:
                shapes[name] = tuple(reader.get_slice(name).get_shape())
                readers[name] = reader
        except Exception as error:  # the library has its own error classes
            raise DataError(
                f"{file} is damaged or incomplete ({first_line(error)}). Download the file again."
            ) from error
    tensors = PublishedTensors(shapes, lambda name: readers[name].get_tensor(name), source)
    return _Weights(tensors, tuple(files), metadata)


def _open_shards(index: Path, source: str) -> _Weights:
    """Open the safetensors files that an index lists."""
    places = _read_mapping(index, json.loads).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(
            f"{index} has no weight_map, which lists the file of each tensor. Download it again."
        )
    names = sorted(set(map(str, places.values())))
    for name in names:
        # A name with a folder could lead out of the checkpoint.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise DataError(
                f"{index} lists the file {name}, which is not in the folder. Download the file "
                f"into {index.parent}."
            )
    opened = _open_safetensors([index.parent / name for name in names], source)
    missing = [name for name in places if not opened.tensors.has(name)]
    if missing:
        raise DataError(
            f"{index} lists the tensor {missing[0]}, but {places[missing[0]]} does not have it. "
            "Download both files again."
        )
    return _Weights(opened.tensors, (index, *opened.files), opened.metadata)


def _open_pickled(file: Path, source: str) -> _Weights:
    """Read a file of torch.save: a state dict, or a training checkpoint with a state dict."""
    with show_activity(f"reading {file.name}"):
        content = _load_pickled(file)
    # Keys of the state dict in checkpoints of Lightning and of other training loops.
    nested = next((key for key in ("state_dict", "model") if _is_mapping(content.get(key))), None)
    state = content if nested is None else content[nested]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(
            f"{file} has no tensors, neither at the top level nor below the keys state_dict and "
            "model. Name a file with the state dict of a model."
        )
    average = _find_average(content)
    if average is not None:
        tensors = align_average(tensors, average, str(file))
    step = next((content[key] for key in ("global_step", "step") if key in content), None)
    return _Weights(
        PublishedTensors.from_tensors(tensors, source),
        (file,),
        {},
        step=step if isinstance(step, int) else None,
        is_average=average is not None,
    )


def _load_pickled(file: Path) -> Mapping[str, Any]:
    """Read a file of torch.save without running code of the file."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may raise any error while it is unpickled
        raise DataError(
            f"{file} is damaged, or has pickled objects other than tensors, which can run code "
            f"({_shorten_reason(error)}). ddiff does not load such objects. If you trust the file, "
            "convert it on a machine where it may run code: content = torch.load(file, "
            'weights_only=False); torch.save({key: content[key] for key in ("state_dict", "model", '
            '"ema", "global_step", "step") if key in content}, new_file).'
        ) from error
    if not _is_mapping(content):
        raise DataError(
            f"{file} must have a mapping from names to tensors; it has a {type(content).__name__}. "
            "Save the state dict of the model: torch.save(model.state_dict(), file)."
        )
    return content


def _shorten_reason(error: Exception) -> str:
    """Return the sentence of an error of torch.load that names the cause.

    The other sentences advise to load the file with weights_only=False, which ddiff never does.
    """
    for line in str(error).splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.strip().partition(". ")[0].removeprefix("WeightsUnpickler error: ")
    return first_line(error)


def _find_average(content: Mapping[str, Any]) -> list[Tensor] | None:
    """Return the exponential moving averages of a training checkpoint, in parameter order."""
    ema = content.get("ema")
    if not _is_mapping(ema):
        return None
    averages = ema.get("shadow_params")
    if not isinstance(averages, list | tuple) or not averages:
        return None
    return [average for average in averages if isinstance(average, Tensor)]


def _is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


# ---------------------------------------------------------------------- configuration


def _read_config(directory: Path, weights: _Weights) -> tuple[Mapping[str, Any], list[Path]]:
    """Return the configuration, and the files that were read for it."""
    for name in CONFIGS:
        file = directory / name
        if file.is_file():
            return _read_mapping(file, _choose_parser(file)), [file]
    text = weights.metadata.get("config")
    if text is not None:
        return _parse_mapping(text, json.loads, f"{weights.files[0]}, metadata config"), []
    raise DataError(
        f"{directory} has no configuration: expected one of {', '.join(CONFIGS)}, or the text "
        "`config` in the metadata of a safetensors file. Copy the configuration that was published "
        "with the weights into the folder."
    )


def _choose_parser(file: Path) -> Callable[[str], Any]:
    if file.suffix == ".json":
        return json.loads
    try:
        import yaml
    except ImportError as error:
        raise DataError(
            f"Reading {file} needs the package PyYAML, which is not installed. Run `pip install "
            "pyyaml`, or write the same configuration as config.json."
        ) from error
    return yaml.safe_load


def _read_mapping(file: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """Read a file with a mapping. Raises DataError if the file is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}). Download the file again.") from error
    return _parse_mapping(text, parse, str(file))


def _parse_mapping(text: str, parse: Callable[[str], Any], name: str) -> Mapping[str, Any]:
    """Parse a text. Raises DataError, which names `name`, if it is not a mapping."""
    try:
        content = parse(text)
    except Exception as error:  # json and yaml have different error classes
        raise DataError(f"{name} is damaged ({first_line(error)}). Download it again.") from error
    if not _is_mapping(content):
        raise DataError(
            f"{name} must have a mapping of keys to values; it has a {type(content).__name__}. "
            "Download it again."
        )
    return content


# ---------------------------------------------------------------------- digests


def compute_digest(file: Path) -> FileDigest:
    """Return size and SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with file.open("rb") as stream:
        for block in _read_blocks(stream):
            digest.update(block)
            size += len(block)
    return FileDigest(size, digest.hexdigest())


def _read_blocks(stream: Any) -> Iterable[bytes]:
    while block := stream.read(BLOCK):
        yield block
