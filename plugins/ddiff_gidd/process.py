"""Generalized interpolating diffusion: masks and uniform noise (arXiv 2503.04482).

At time t a state is the clean token with probability alpha(t), the mask with probability c_mask(t)
and a uniformly drawn token with probability c_tokens(t). c_tokens is 0 at t = 0 and t = 1 and has a
peak in between. The exponent gamma sets the width of the peak: smaller values are broader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, final

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
# Largest fraction of the tokens that may become noise before t = 1e-12, the earliest time that
# training evaluates. Training never evaluates the times at which this fraction becomes noise.
MOST_AT_ONCE = 0.02


class Mixing(Protocol):
    """Interface of mixings: probabilities of clean token, mask and uniform token at time t."""

    @property
    def gamma(self) -> float: ...

    @property
    def per_token(self) -> float:
        """Coefficient b of uniform noise, used in the weights of the training loss `Dynamic`.

        Before normalization, uniform noise adds about b (t (1 - t))^(gamma/2) to the probability of
        each token.
        """

    def shares(self, t: Tensor) -> Tensor:
        """Return the probabilities [r,3] of clean token, mask and uniform token at times t [r].

        The columns are alpha, c_mask and c_tokens. Each row sums to 1.
        """


@final
@dataclass(frozen=True)
class CurrentMixing:
    """Probabilities of clean token, mask and uniform noise in the current code of the GIDD authors.

    At time t, a position holds the clean token, the mask or a uniformly drawn token with the
    probabilities

        (alpha, c_mask, c_tokens) = (1 - t, t, c)/(1 + c),

    where c = `height` * (t (1 - t))^(gamma/2) and `height` = 2^gamma p_uniform/(1 - p_uniform).
    Uniform noise then has the probability p_uniform at t = 1/2.
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
    """Probabilities of clean token, mask and uniform noise in an older version of the GIDD code.

    Let w be the time in that code, v = 1 - w, N the number of tokens, b = `per_token` and
    c = b (v w)^(gamma/2). A position holds the clean token, the mask or a uniformly drawn token
    with the probabilities

        (alpha, c_mask, c_tokens) = (v^gamma - c, w^gamma, N c)/(v^gamma + w^gamma + (N - 1) c).

    In that code w runs from 0 to 1, but alpha would be negative for w above
    w_1 = 1/(1 + b^(2/gamma)). The time of this class is t = w/w_1, so that alpha = 0 at t = 1.
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
        # left = v^(gamma/2) and gone = w^(gamma/2), both multiplied by (1 + b^(2/gamma))^(gamma/2).
        # The common factor cancels in the normalization, and alpha is exactly 0 at t = 1.
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
    """Generalized interpolating diffusion: noise by masks and by uniformly drawn tokens.

    The marginal is q_t(.|x) = alpha delta_x + c_mask delta_mask + c_tokens Unif, where Unif is the
    uniform distribution over the tokens. A `Mixing` defines alpha, c_mask and c_tokens as functions
    of t.
    """

    class Config(ComponentConfig):
        p_uniform: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
        """Fraction of uniform noise at t = 1/2; 0 is masked diffusion."""
        gamma: Annotated[float, Field(ge=0.3, le=2.0)] = 1.0
        """Exponent of the peak of uniform noise over time; smaller values are broader."""
        form: Form = "current"
        """Mixing of the "current" code of the GIDD authors, or of their "original" code, which HDLM
        uses."""

    def __init__(self, vocabulary: Vocabulary, mixing: Mixing) -> None:
        self.mixing = mixing
        super().__init__(
            vocabulary, [mask_distribution(vocabulary), token_distribution(vocabulary)]
        )

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> GeneralizedInterpolation:
        if vocabulary.num_levels != 1:
            raise ArgumentError(
                'The process "gidd" needs a vocabulary of tokens and a mask, without clusters; '
                f'got {vocabulary}. Use [vocabulary] kind = "flat".'
            )
        mixing = MIXINGS[config.form](config.p_uniform, config.gamma, vocabulary.num_tokens)
        process = cls(vocabulary, mixing)
        # `interior` moves t = 0 to the earliest time at which rates are evaluated.
        earliest = interior(torch.zeros(1, dtype=torch.float64))
        noisy = 1.0 - float(process.alpha(earliest))
        if noisy > MOST_AT_ONCE:
            raise ArgumentError(
                f'The process "gidd" with p_uniform = {config.p_uniform} and gamma = '
                f"{config.gamma} must replace at most {MOST_AT_ONCE:.0%} of the tokens by noise "
                "before t = 1e-12, the earliest time that training evaluates; "
                f"got {noisy:.0%}. Training would never evaluate the times at which this fraction "
                "of the tokens becomes noise. Use a larger gamma, or a smaller p_uniform."
            )
        return process

    def alpha(self, t: Tensor) -> Tensor:
        return self.mixing.shares(t)[..., 0]

    def coefficients(self, t: Tensor) -> Tensor:
        return self.mixing.shares(t)[..., 1:]

    formulas: ClassVar[str] = """
        marginal    q_t(.|x) = alpha delta_x + noise_t,  where noise_t = c_m delta_m + c_u u
        rates       omega(z) = noise_t'(z) - (alpha'/alpha) noise_t(z)
        integrand   (omega(z)/q_t(z|x)) [ KL( q_t(.|x) || q_t-bar ) + rho - ln rho - 1 ]
        step        from t to s < t: z changes with probability
                    (noise_t(z) - (alpha_t/alpha_s) noise_s(z)) (1 - q_s-bar(z))/q_t-bar(z),
                    to a draw from q_s-bar other than z

        x, z        clean token, and state of its position at time t
        m, u        mask; uniform distribution over the tokens
        alpha, c_m, c_u   probabilities of clean token, mask and uniform noise at time t
        q_t-bar     distribution of z if x follows the distribution that the network predicts
        rho         q_t(z|x)/q_t-bar(z)
        omega(z)    rate at which z is entered, the same from every other state
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"p_uniform": 0.0, "gamma": 1.0, "form": "current"},
        {"p_uniform": 0.2, "gamma": 1.0, "form": "current"},
        {"p_uniform": 0.1, "gamma": 2.0, "form": "current"},
        {"p_uniform": 0.5, "gamma": 0.5, "form": "current"},
        {"p_uniform": 0.0, "gamma": 2.0, "form": "original"},
        {"p_uniform": 0.2, "gamma": 1.0, "form": "original"},
        {"p_uniform": 0.5, "gamma": 0.5, "form": "original"},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        configs = [cls.Config(**keys) for keys in cls.example_settings]
        return [cls.build(config, vocabulary=FlatVocabulary(3)) for config in configs]
