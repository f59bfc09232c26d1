"""Noising process on a ring: a token moves to one of its two neighbours.

ddiff derives the training loss, the likelihood bound and the samplers from the rate matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    Probability,
    Vocabulary,
)


class PluginName(DenseProcess):
    """Random walk on the ring of the tokens 0, 1, ..., V-1, 0.

    At t = 1 all tokens are equally likely. The rates are scaled so that the slowest wave of
    probability around the ring decays like 1 - t.
    """

    class Config(ComponentConfig):
        up: Probability = 0.5
        """Probability that a step goes to the next token, and not to the previous one."""

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> PluginName:
        size = vocabulary.num_tokens
        if vocabulary.num_states != size or size < 3:
            raise ArgumentError(
                f"The process plugin_name needs at least three tokens and no other state; got "
                f'{vocabulary}. Use [vocabulary] kind = "flat", mask = false.'
            )
        return cls(vocabulary, cls.rate_matrix(size, config.up))

    @staticmethod
    def rate_matrix(size: int, up: float) -> Tensor:
        """Return the generator [V,V]. Row y has the rates from token y to the other tokens."""
        stay = torch.eye(size, dtype=torch.float64)
        step = up * stay.roll(1, dims=1) + (1.0 - up) * stay.roll(-1, dims=1)
        return (step - stay) / (1.0 - math.cos(2.0 * math.pi / size))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """Return the processes that `ddiff check plugin_name` tests."""
        vocabulary = FlatVocabulary(3, mask=False)
        return [cls.build(cls.Config(up=up), vocabulary=vocabulary) for up in (0.5, 0.8)]
