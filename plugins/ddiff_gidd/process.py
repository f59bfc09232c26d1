"""Generalized interpolating diffusion: masking with a hump of uniform noise (arXiv 2503.04482).

A state is the clean token with probability alpha_t, the mask with c_mask(t) and a token drawn
uniformly with c_tokens(t). gamma shapes the hump of c_tokens over time.
"""

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
# Largest share of the tokens that may be noise at the earliest time that is evaluated. Training
# never draws the times before it, at which these tokens change.
MOST_AT_ONCE = 0.02


class Mixing(Protocol):
    """Shares of clean token, mask and uniform noise as functions of time."""

    @property
    def gamma(self) -> float: ...

    @property
    def per_token(self) -> float:
        """b, the height of the hump for one token, which the dynamic training weights use."""

    def shares(self, t: Tensor) -> Tensor:
        """Times [r] -> [r,3]: alpha, c_mask and c_tokens, which sum to 1."""


@final
@dataclass(frozen=True)
class CurrentMixing:
    """Shares (1 - t, t, c)/(1 + c), the published code as it is.

    c = B (t (1-t))^(gamma/2) with B = 2^gamma p_uniform/(1 - p_uniform), `height`.
    """

    p_uniform: float
    gamma: float
    num_tokens: int

    @property
    def height(self) -> float:
        return 2.0**self.gamma * self.p_uniform / (1.0 - self.p_uniform)

    @property
    def per_token(self) -> float:
        return self.height / (self.num_tokens + 1)

    def shares(self, t: Tensor) -> Tensor:
        hump = self.height * (t * (1.0 - t)) ** (self.gamma / 2)
        return torch.stack([1.0 - t, t, hump], -1) / (1.0 + hump).unsqueeze(-1)


@final
@dataclass(frozen=True)
class OriginalMixing:
    """Shares (v^gamma - c, w^gamma, N c)/(v^gamma + w^gamma + (N - 1) c), the older published code.

    N is the number of tokens, w the time of that code, v = 1 - w and c = b (v w)^(gamma/2). alpha
    reaches 0 at the w with v^(gamma/2) = b w^(gamma/2), which is t = 1 here:
    w = t/(1 + b^(2/gamma)).
    """

    p_uniform: float
    gamma: float
    num_tokens: int

    @property
    def per_token(self) -> float:
        p = self.p_uniform
        num_states = self.num_tokens + 1
        return 2.0 * p / (2.0 * p + (1.0 - p) * num_states)

    def shares(self, t: Tensor) -> Tensor:
        power = self.gamma / 2
        b = self.per_token
        # v and w to the power gamma/2, both times (1 + b^(2/gamma))^(gamma/2): the common factor
        # cancels in the normalization, and the root of alpha at t = 1 stays exact.
        left = (1.0 - t + b ** (1.0 / power)) ** power
        gone = t**power
        token = left * (left - b * gone).clamp(min=0.0)
        shares = torch.stack([token, gone**2, self.num_tokens * b * left * gone], -1)
        return shares / shares.sum(-1, keepdim=True)


MIXINGS: dict[Form, type[CurrentMixing] | type[OriginalMixing]] = {
    "current": CurrentMixing,
    "original": OriginalMixing,
}


class GeneralizedInterpolation(ComponentProcess):
    """Process with q_t(.|x) = alpha delta_x + c_mask delta_mask + c_tokens (uniform over tokens).

    The shares come from a `Mixing`. The bound is exact.
    """

    class Config(ComponentConfig):
        p_uniform: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
        """Share of uniform noise at t = 1/2; 0 is masked diffusion."""
        gamma: Annotated[float, Field(ge=0.3, le=2.0)] = 1.0
        """Exponent of the hump of uniform noise over time; smaller is broader."""
        form: Form = "current"
        """Mixing of the published code, or the older one that the code of HDLM uses too."""

    def __init__(self, vocabulary: Vocabulary, mixing: Mixing) -> None:
        self.mixing = mixing
        super().__init__(
            vocabulary, [mask_distribution(vocabulary), token_distribution(vocabulary)]
        )

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> GeneralizedInterpolation:
        if vocabulary.num_levels != 1:
            raise ArgumentError(
                f"The process gidd needs tokens and a mask, with no clusters between; got "
                f"{vocabulary}. "
                'Use [vocabulary] kind = "flat".'
            )
        mixing = MIXINGS[config.form](config.p_uniform, config.gamma, vocabulary.num_tokens)
        process = cls(vocabulary, mixing)
        earliest = interior(torch.zeros(1, dtype=torch.float64))
        noisy = 1.0 - float(process.alpha(earliest))
        if noisy > MOST_AT_ONCE:
            raise ArgumentError(
                f"The process gidd with p_uniform = {config.p_uniform} and gamma = {config.gamma}: "
                f"{noisy:.0%} of the tokens are noise already at the earliest time that is "
                "evaluated, t = 1e-12, so that training never draws the times at which they turn "
                "into noise. Use a larger gamma, or a smaller p_uniform."
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
        configs = [cls.Config(p_uniform=p, gamma=gamma, form=form) for p, gamma, form in settings]
        return [cls.build(config, vocabulary=FlatVocabulary(3)) for config in configs]
