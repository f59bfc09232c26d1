"""Encoder from a directory that the sentence-transformers package has saved.

The package itself is not needed: the files describe a model of the transformers library, a pooling
and an optional normalization.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from ddiff import ComponentConfig, DataError, PositiveInt
from ddiff_encoders.pooling import PooledEncoder, Pooling, load_model, load_tokenizer

MODULES = "modules.json"
# Keys of the configuration of a pooling module, and their names here. Newer directories have one
# key "pooling_mode" with the second part of these names.
POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


class SentenceModel(NamedTuple):
    """Description of a directory of sentence-transformers.

    Args:
        folder: folder of the transformers model.
        pooling: pooling of its hidden states.
        normalize: whether vectors are normalized.
        max_tokens: largest number of tokens of a text; None: not given.
        prefix: text before every text; "" if there is none.
    """

    folder: Path
    pooling: Pooling
    normalize: bool
    max_tokens: int | None
    prefix: str


@final
class SentenceEncoder:
    """Encoder from a sentence-transformers directory, with its pooling and normalization."""

    class Config(ComponentConfig):
        path: str
        """Local directory with the file modules.json."""
        max_tokens: PositiveInt | None = None
        """Longest text in tokens; longer texts are cut. By default the length in the directory."""
        batch: PositiveInt = 64
        """Number of texts in a batch."""
        prefix: str | None = None
        """Text before every text. By default the default prompt of the directory."""
        dim: PositiveInt | None = None
        """Keep only the first coordinates, for models that were trained for it (Matryoshka)."""

    @staticmethod
    def build(config: Config, *, device: torch.device) -> PooledEncoder:
        described = read_sentence_model(Path(config.path))
        return PooledEncoder(
            load_model(str(described.folder)),
            load_tokenizer(str(described.folder)),
            pooling=described.pooling,
            normalize=described.normalize,
            max_tokens=config.max_tokens or described.max_tokens,
            batch=config.batch,
            prefix=described.prefix if config.prefix is None else config.prefix,
            dim=config.dim,
            device=device,
        )


def read_sentence_model(folder: Path) -> SentenceModel:
    """Read pooling, normalization and lengths from a directory of sentence-transformers.

    Raises DataError for a missing or damaged file, and for a module that is not supported.
    """
    if not (folder / MODULES).is_file():
        raise DataError(
            f"No sentence-transformers model in {str(folder)!r}: the directory has no {MODULES}. "
            "Name a local directory in which sentence-transformers saved a model, or use kind = "
            '"transformers", which also takes a name on the hub.'
        )
    modules: dict[str, Path] = {}
    for module in _read_json(folder / MODULES, list):
        # the class, such as "sentence_transformers.models.Pooling"
        modules[str(module["type"]).rpartition(".")[2]] = folder / str(module.get("path", ""))
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown or not {"Transformer", "Pooling"} <= set(modules):
        raise DataError(
            f"{folder / MODULES} must list the modules Transformer, Pooling and optionally "
            f"Normalize; it lists {', '.join(modules) or 'none'}. Use a model of these modules, or "
            "write an encoder for this model (docs/data.md)."
        )
    transformer = modules["Transformer"]
    lengths = _read_json(transformer / "sentence_bert_config.json", dict, is_optional=True)
    prompts = _read_json(folder / "config_sentence_transformers.json", dict, is_optional=True)
    prompt_name = prompts.get("default_prompt_name")
    return SentenceModel(
        folder=transformer,
        pooling=_read_pooling(modules["Pooling"] / "config.json"),
        normalize="Normalize" in modules,
        max_tokens=lengths.get("max_seq_length"),
        prefix=prompts.get("prompts", {}).get(prompt_name, "") if prompt_name else "",
    )


def _read_pooling(path: Path) -> Pooling:
    """Return the pooling of a Pooling module. Raises DataError unless it is one known pooling."""
    config = _read_json(path, dict)
    given = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if isinstance(config.get("pooling_mode"), str):
        given = [config["pooling_mode"]]
    known = {**POOLINGS, **MODES}
    if len(given) != 1 or given[0] not in known:
        raise DataError(
            f"{path} must have exactly one pooling of {', '.join(POOLINGS)}; it has "
            f"{', '.join(given) or 'none'}. Use a model with one of these poolings."
        )
    return known[given[0]]


def _read_json(path: Path, kind: type, is_optional: bool = False) -> Any:
    """Read a JSON file that holds a list or an object (`kind`). A missing file is empty.

    Raises DataError if the file is damaged, or missing and not optional.
    """
    if is_optional and not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Copy the directory again.") from error
    if not isinstance(found, kind):
        raise DataError(
            f"{path} must hold a JSON {'list' if kind is list else 'object'}; it holds a "
            f"{type(found).__name__}. Copy the directory again."
        )
    return found
