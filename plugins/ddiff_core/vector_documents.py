"""Texts with one vector each as data sets of a recipe of text: the vector is a condition.

The files and keys are those of the data sets of several fields with the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff_core.fields_files import VectorFiles, VectorShards

if TYPE_CHECKING:
    from ddiff import Cache, Documents


class ConditionedVectorFiles:
    """Texts and a .npy file with the vector of each text, which is the condition "latent"."""

    Config = VectorFiles.Config

    @staticmethod
    def build(
        config: VectorFiles.Config, *, length: int, seed: int, cache: Cache | None
    ) -> Documents:
        from ddiff import join_vectors

        return join_vectors(VectorFiles.build(config, seed=seed, cache=cache), cache=cache)

    @staticmethod
    def preview(config: VectorFiles.Config) -> None:
        """Raise an error if the folder has no vectors, unless `dim` is given."""
        VectorFiles.preview(config)


class ConditionedVectorShards:
    """JSON lines with texts, and .npy files with many vectors, which are the condition "latent"."""

    Config = VectorShards.Config

    @staticmethod
    def build(
        config: VectorShards.Config, *, length: int, seed: int, cache: Cache | None
    ) -> Documents:
        from ddiff import join_vectors

        return join_vectors(VectorShards.build(config, seed=seed, cache=cache), cache=cache)

    @staticmethod
    def preview(config: VectorShards.Config) -> None:
        """Raise an error if the folder has no vectors, unless `dim` is given."""
        VectorShards.preview(config)
