"""Vocabulary with a tree: groups of tokens that are about equally frequent."""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    HierarchicalVocabulary,
    PositiveInt,
    Rows,
    Tokenizer,
)


class PluginName:
    """Tree of tokens, groups and a mask. The first group has the most frequent tokens."""

    class Config(ComponentConfig):
        groups: PositiveInt = 2
        """Number of groups; they have as equal numbers of tokens as possible."""

    @classmethod
    def build(  # may also take cache
        cls, config: Config, *, tokenizer: Tokenizer, rows: Rows
    ) -> HierarchicalVocabulary:
        counts = torch.as_tensor(rows.token_counts())
        # stable, so that tokens of equal counts keep their order on every machine
        by_frequency = counts.argsort(descending=True, stable=True)
        parents = torch.empty(len(counts), dtype=torch.long)
        parents[by_frequency] = cls._number_groups(config, len(counts))
        # the parent of each token is a group, and the parent of each group is the mask
        return HierarchicalVocabulary(
            [parents.tolist()], tokenizer_fingerprint=tokenizer.fingerprint
        )

    @classmethod
    def preview(cls, config: Config, *, num_tokens: int) -> HierarchicalVocabulary:
        """Return a tree of the same shape, so that a dry run needs no data."""
        return HierarchicalVocabulary([cls._number_groups(config, num_tokens).tolist()])

    @staticmethod
    def _number_groups(config: Config, num_tokens: int) -> Tensor:
        """Return the group of the first, second, ... most frequent token."""
        if config.groups >= num_tokens:
            raise ArgumentError(
                f"plugin_name: groups must be less than the number of tokens, {num_tokens}; got "
                f"{config.groups}. Use fewer groups, or a tokenizer with more tokens."
            )
        return torch.arange(num_tokens) * config.groups // num_tokens
