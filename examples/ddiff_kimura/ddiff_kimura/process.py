"""Process for nucleotides: substitution with the two rates of Kimura (1980).

The class `Kimura` defines a rate matrix. ddiff derives loss, bound, samplers and checks from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    PositiveFloat,
    Vocabulary,
)

ORDER = "ACGT"
# Transitions exchange purine with purine (A, G) and pyrimidine with pyrimidine (C, T).
TRANSITION = {"A": "G", "G": "A", "C": "T", "T": "C"}


class Kimura(DenseProcess):
    """Substitution of nucleotides with a rate of transitions and a rate of transversions.

    Transitions exchange A with G or C with T; all other changes are transversions. Only the ratio
    of the two rates matters: every nucleotide mutates at the total rate 1 in the time -ln(1 - t).
    At t = 1 all four nucleotides are equally likely. Symbols must be in the order ACGT.
    """

    class Config(ComponentConfig):
        ts: PositiveFloat = 2.0
        """Relative rate of transitions, A-G and C-T."""
        tv: PositiveFloat = 1.0
        """Relative rate of transversions, all other changes."""

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> Kimura:
        if vocabulary.num_states != len(ORDER):
            raise ArgumentError(
                f"The process kimura has the four states {ORDER}; got {vocabulary}. "
                f'Use [tokenizer] kind = "alphabet", symbols = "{ORDER}" and '
                '[vocabulary] kind = "flat", mask = false.'
            )
        return cls(vocabulary, cls.rate_matrix(config.ts, config.tv))

    @staticmethod
    def rate_matrix(ts: float, tv: float) -> Tensor:
        """Return the generator [4,4] with rates ts of transitions and tv of transversions.

        Row y has the rates from nucleotide y to the others, scaled to the sum 1, and -1 on the
        diagonal.
        """
        matrix = torch.full((len(ORDER), len(ORDER)), tv, dtype=torch.float64)
        for row, symbol in enumerate(ORDER):
            matrix[row, ORDER.index(TRANSITION[symbol])] = ts
            matrix[row, row] = 0.0
        return matrix / (ts + 2.0 * tv) - torch.eye(len(ORDER))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """Return the processes that the command `ddiff check kimura` tests."""
        vocabulary = FlatVocabulary(len(ORDER), mask=False)
        configs = [cls.Config(ts=ts, tv=1.0) for ts in (2.0, 1.0, 0.5)]
        return [cls.build(config, vocabulary=vocabulary) for config in configs]
