"""Nucleotides that mutate: a rate matrix of two numbers, and the engine derives the rest."""

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

PARTNER = {"A": "G", "G": "A", "C": "T", "T": "C"}  # purine for purine, pyrimidine for pyrimidine
ORDER = "ACGT"


class Kimura(DenseProcess):
    """Substitution with two rates (Kimura 1980): transitions `ts` (A-G, C-T) and transversions `tv` (all others).

    Rates are relative: a site is hit once per unit of noise -ln(1 - t), and at t = 1 all four are equally likely. Symbols
    must come in the order ACGT.
    """

    class Config(ComponentConfig):
        ts: PositiveFloat = 2.0
        tv: PositiveFloat = 1.0

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> Kimura:
        if vocabulary.num_states != len(ORDER):
            raise ArgumentError(
                f'The process kimura has the four states {ORDER}; got {vocabulary}. Use [tokenizer] kind = "alphabet", '
                f'symbols = "{ORDER}" and [vocabulary] kind = "flat", mask = false.'
            )
        return cls(vocabulary, cls.rate_matrix(config.ts, config.tv))

    @staticmethod
    def rate_matrix(ts: float, tv: float) -> Tensor:
        """[4,4] the generator, rows from A, C, G, T; each leaves at rate 1."""
        rates = [[0.0 if y == z else ts if PARTNER[y] == z else tv for z in ORDER] for y in ORDER]
        matrix = torch.tensor(rates, dtype=torch.float64) / (ts + 2.0 * tv)
        return matrix - torch.eye(len(ORDER))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """What `ddiff check kimura` proves the laws on."""
        bare = FlatVocabulary(len(ORDER), mask=False)
        return [cls.build(cls.Config(ts=ts, tv=1.0), vocabulary=bare) for ts in (2.0, 1.0, 0.5)]
