"""Layouts: conversion between published checkpoints and the weights of a denoiser.

A layout is a component of a plugin, of the kind `layout`. It knows the names of the tensors and the
keys of the configuration of one published format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddiff.checkpoint.published_files import PublishedFiles
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class Imported:
    """Model that a layout has read from a published checkpoint.

    Attributes:
        recipe: tables of a recipe as nested mappings, with `plugins`, `data.length`, `vocabulary`,
            `process`, `denoiser`, `objective` and `sample`; without `name`, `run_dir` and
            `tokenizer`.
        weights: state dict of the denoiser, with the names `backbone.*` and `head.*`.
        num_tokens: number V of tokens.
        tokenizer: hub name of the tokenizer of the publication, which is used if the checkpoint has
            no tokenizer; None if it is unknown.
        notes: sentences for the user, such as about a part of the model that was left out.
        must_predict: whether the import is refused if the model predicts masked tokens no better
            than a constant guess. A layout sets it if the mask id or the shift of the output could
            be wrong without another error.
    """

    recipe: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    num_tokens: int
    tokenizer: str | None = None
    notes: Sequence[str] = ()
    must_predict: bool = False


@dataclass(frozen=True)
class ExportSource:
    """Trained model that a layout writes.

    Attributes:
        recipe: the resolved recipe as nested mappings, with every key.
        weights: state dict of the denoiser.
        vocabulary: vocabulary of the run.
    """

    recipe: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Exported:
    """Configuration and tensors in a published format.

    Attributes:
        config: content of config.json.
        tensors: tensors of model.safetensors by name.
        notes: sentences for the user.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: Sequence[str] = ()


class Layout(ABC):
    """Published format of checkpoints."""

    @abstractmethod
    def recognize(self, files: PublishedFiles) -> bool:
        """Return whether the files have this format.

        Only the configuration and the names and shapes of the tensors are read. At most one layout
        of all plugins may recognize the same files.
        """

    @abstractmethod
    def read(self, files: PublishedFiles) -> Imported:
        """Convert the files to a recipe and weights.

        Every tensor must be used (`PublishedTensors.take` or `skip`). Raises DataError, which names
        the tensor or the key, for files of another model.
        """

    def write(self, source: ExportSource) -> Exported:
        """Convert a trained model to this format.

        Raises ArgumentError, which names the reason, for a model that the format cannot represent.
        """
        raise ArgumentError(
            "export: this layout only reads checkpoints, and does not write them. Use another "
            "--format, or export the weights under their own names with --format safetensors."
        )
