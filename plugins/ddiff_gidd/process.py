"""A word fades into the mask, with a hump of uniform noise half-way (arXiv 2503.04482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, final

import torch
from pydantic import Field
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    ComponentProcess,
    FlatVocabulary,
    ForwardProcess,
    Vocabulary,
    interior,
    mask_distribution,
    token_distribution,
)

Form = Literal["current", "original"]
MOST_AT_ONCE = (
    0.02  # of the tokens noise at the earliest time: a share that no draw of training reaches
)


class Mixing(Protocol):
    """How much of a state is what at t."""

    @property
    def gamma(self) -> float: ...

    @property
    def per_word(self) -> float:
        """b, the height of the hump on one word as the training weights read it."""

    def shares(self, t: Tensor) -> Tensor:
        """[r] -> [r,3]: the clean word, the mask, uniform noise over all words; they sum to 1."""


@final
@dataclass(frozen=True)
class CurrentMixing:
    """Shares (1 - t, t, c)/(1 + c) with c = B (t (1-t))^(gamma/2), B = 2^gamma p_uniform/(1 - p_uniform)."""

    p_uniform: float
    gamma: float
    num_words: int

    @property
    def height(self) -> float:
        return 2.0**self.gamma * self.p_uniform / (1.0 - self.p_uniform)

    @property
    def per_word(self) -> float:
        return self.height / (self.num_words + 1)

    def shares(self, t: Tensor) -> Tensor:
        hump = self.height * (t * (1.0 - t)) ** (self.gamma / 2)
        return torch.stack([1.0 - t, t, hump], -1) / (1.0 + hump).unsqueeze(-1)


@final
@dataclass(frozen=True)
class OriginalMixing:
    """Shares (v^gamma - c, w^gamma, N c)/(v^gamma + w^gamma + (N - 1) c) with v = 1 - w, c = b (v w)^(gamma/2).

    Nothing is left of the word at the w where v^(gamma/2) = b w^(gamma/2), which is our t = 1: w = t/(1 + b^(2/gamma)).
    """

    p_uniform: float
    gamma: float
    num_words: int

    @property
    def per_word(self) -> float:
        p, num_states = self.p_uniform, self.num_words + 1
        return 2.0 * p / (2.0 * p + (1.0 - p) * num_states)

    def shares(self, t: Tensor) -> Tensor:
        power, b = self.gamma / 2, self.per_word
        # v and w to the gamma/2, both by the factor (1 + b^(2/gamma))^(gamma/2)
        left, gone = (1.0 - t + b ** (1.0 / power)) ** power, t**power
        word = left * (left - b * gone).clamp(min=0.0)
        shares = torch.stack([word, gone**2, self.num_words * b * left * gone], -1)
        return shares / shares.sum(-1, keepdim=True)


MIXINGS: dict[Form, type[CurrentMixing] | type[OriginalMixing]] = {
    "current": CurrentMixing,
    "original": OriginalMixing,
}


class GeneralizedInterpolation(ComponentProcess):
    """q_t(.|x) = alpha delta_x + c_mask delta_mask + c_words uniform over words, by a `Mixing`; the bound is exact."""

    class Config(ComponentConfig):
        p_uniform: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
        """The share of uniform noise at t = 1/2; 0 is masked diffusion."""
        gamma: Annotated[float, Field(ge=0.3, le=2.0)] = 1.0
        """Of the hump of uniform noise: small is broad, 2 is its square."""
        form: Form = "current"
        """The parameterisation of the published code as it is, or the one before, which is in the code of HDLM."""

    def __init__(self, vocabulary: Vocabulary, mixing: Mixing) -> None:
        self.mixing = mixing
        super().__init__(
            vocabulary, [mask_distribution(vocabulary), token_distribution(vocabulary)]
        )

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> GeneralizedInterpolation:
        if vocabulary.num_levels != 1:
            raise ArgumentError(
                f"The process gidd needs words and a mask, nothing between; got {vocabulary}. "
                'Use [vocabulary] kind = "flat".'
            )
        process = cls(
            vocabulary, MIXINGS[config.form](config.p_uniform, config.gamma, vocabulary.num_tokens)
        )
        noisy = 1.0 - float(process.alpha(interior(torch.zeros(1, dtype=torch.float64))))
        if noisy > MOST_AT_ONCE:
            raise ArgumentError(
                f"The process gidd with p_uniform = {config.p_uniform} and gamma = {config.gamma}: {noisy:.0%} of the "
                "tokens are noise already at the earliest time that is read, t = 1e-12, so that training never draws the "
                "times at which they become it. Use a larger gamma, or a smaller p_uniform."
            )
        return process

    def alpha(self, t: Tensor) -> Tensor:
        return self.mixing.shares(t)[..., 0]

    def coefficients(self, t: Tensor) -> Tensor:
        return self.mixing.shares(t)[..., 1:]

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        settings: tuple[tuple[float, float, Form], ...] = (
            (0.0, 1.0, "current"),
            (0.2, 1.0, "current"),
            (0.1, 2.0, "current"),
            (0.5, 0.5, "current"),
            (0.0, 2.0, "original"),
            (0.2, 1.0, "original"),
            (0.5, 0.5, "original"),
        )
        return [
            cls.build(cls.Config(p_uniform=p, gamma=gamma, form=form), vocabulary=FlatVocabulary(3))
            for p, gamma, form in settings
        ]
