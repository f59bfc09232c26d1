"""Score head: probability ratios of all states to the current state (arXiv 2310.16834).

The score at a state z_t is s(y) = q_t-bar(y)/q_t-bar(z_t) for every state y. Here q_t-bar is the
predicted distribution of the state at time t, given the other positions. V is the number of tokens,
and sigma is the total noise up to time t: with probability e^-sigma a token has not been noised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    ForwardProcess,
    Head,
    Score,
    SubtreeDistribution,
    Vocabulary,
)

# Ratios to the mask diverge at t = 1, where every token is masked.
LATEST = 1.0 - 1e-12
# At t = 0 nothing is noise, and e^sigma - 1 is 0.
EARLIEST = 1e-12

HeadCallback = Callable[[Any, Tensor], Any]


@final
class RatioDistribution(SubtreeDistribution):
    """Output of the score head, also usable as a distribution over the V tokens.

    `raw` [r,S] are the outputs for the S states: the V tokens and possibly the mask. They are
    log-ratios up to a constant per row, so that their softmax over the tokens is a distribution.
    """

    def __init__(self, raw: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, vocabulary.root)
        self.raw = raw

    def log_below(self, level: int) -> Tensor:
        tokens = self.raw[:, : self.vocabulary.num_tokens].log_softmax(-1)
        return tokens if level == 0 else tokens.logsumexp(-1, keepdim=True)


@final
@dataclass(frozen=True)
class Ratios:
    """Score parameterization: the head output raw(y) is the log-ratio ln s(y), for every state y.

    At the current state y = z_t the log-ratio is set to 0. V is the number of tokens, and sigma the
    total noise. With `scaled`, rows at masks are scaled:
    ln s(y) = raw(y) - ln V - ln(e^sigma - 1). The head output ln p(y) + ln V then gives the score
    p(y)/(e^sigma - 1), which is exact if the clean token has the distribution p. With `everywhere`,
    rows at tokens are scaled in the same way, with e^-sigma the keep probability of the process.
    """

    scaled: bool
    everywhere: bool = False
    predicts: ClassVar[Literal["score"]] = "score"

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor:
        """Return the log-scale [k] that `wrap_callback` subtracts from the head output of k rows.

        The log-scale is ln(V (e^sigma - 1)) at masks, and 0 at tokens or if `scaled` is False. With
        `everywhere` it is ln(V (e^sigma - 1)) at all rows.
        e^sigma - 1 is the probability of the mask divided by the total probability of the tokens.
        This ratio is computed from the marginal of the process, so that it is right for any process
        with a mask.
        """
        scale = torch.zeros_like(t)
        if self.everywhere:
            kept = process.keep_probability(t.clamp(EARLIEST, LATEST))
            return math.log(process.vocabulary.num_tokens) + torch.log(1.0 / kept - 1.0)
        masked = ((zt == process.vocabulary.root) & self.scaled).nonzero().squeeze(-1)
        if len(masked) == 0:
            return scale
        num_tokens = process.vocabulary.num_tokens
        # Many rows have the same time, and a marginal has S entries: one per distinct time.
        distinct, place = t[masked].clamp(max=LATEST).unique(return_inverse=True)
        zeros = torch.zeros(len(distinct), num_tokens, dtype=t.dtype, device=t.device)
        log_uniform = zeros.log_softmax(-1)
        log_q = process.log_marginal(log_uniform, distinct)
        log_q_mask = log_q[:, process.vocabulary.root]
        log_q_tokens = log_q[:, :num_tokens].logsumexp(-1)
        log_scale = log_q_mask - log_q_tokens + log_uniform[:, 0].neg()
        scale[masked] = log_scale[place]
        return scale

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        # The callback `fn` gets a Score in place of the raw output of the head.
        def question(dist: RatioDistribution, idx: Tensor) -> Any:
            own = zt[idx].unsqueeze(-1)
            log_ratio = dist.raw - prepared[idx].to(dist.raw.dtype).unsqueeze(-1)
            return fn(Score(log_ratio.scatter(-1, own, 0.0)), idx)

        return question

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        return torch.full_like(node, process.vocabulary.root)


@final
class ScoreHead(Head):
    """Score head: one output per state, the log of its probability ratio to the current state.

    With `scaled`, the outputs at masks are scaled (see `Ratios`). The initial output is then the
    score of the uniform distribution, or of the unigram distribution after `start_from_counts`.
    Without `scaled`, all ratios are initially 1.
    """

    parameterization: Ratios

    class Config(ComponentConfig):
        scaled: bool | None = None
        """Whether ratios at masks are divided by V (e^sigma - 1); by default true if the
        vocabulary has a mask."""
        everywhere: bool = False
        """Divide ratios at tokens, too, by V (e^sigma - 1), as published gamma-hybrids do;
        e^-sigma is the probability that a token has no noise."""

    def __init__(
        self, vocabulary: Vocabulary, width: int, scaled: bool, everywhere: bool = False
    ) -> None:
        if vocabulary.num_levels > 1:
            raise ArgumentError(
                'head = "score" predicts ratios of tokens and a mask, and needs a vocabulary '
                f"without clusters; got {vocabulary}. "
                'Use [vocabulary] kind = "flat", or a head that predicts a distribution: "tied" or '
                '"levelwise".'
            )
        if scaled and vocabulary.mask_id is None:
            raise ArgumentError(
                'head = "score" with scaled = true needs a vocabulary with a mask; '
                f"got {vocabulary}. Remove scaled = true."
            )
        if everywhere and not scaled:
            raise ArgumentError(
                'head = "score": everywhere = true needs scaled = true, since it scales ratios at '
                "all positions instead of masks only. Remove everywhere, or set scaled = true."
            )
        super().__init__(vocabulary, width, vocabulary.num_states)
        self.parameterization = Ratios(scaled, everywhere)

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, width: int) -> ScoreHead:
        scaled = vocabulary.mask_id is not None if config.scaled is None else config.scaled
        return cls(vocabulary, width, scaled, config.everywhere)

    def dist(self, logits: Callable[[int, int], Tensor], top: int) -> RatioDistribution:
        return RatioDistribution(logits(0, self.vocabulary.num_states), self.vocabulary)

    def logits_per_row(self, top: int) -> int:
        return self.vocabulary.num_states

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """Set the biases so that exp(bias)/V is the unigram distribution.

        `counts` [V] are the token counts, to which one is added. The method does nothing if the
        head is not scaled.
        """
        if self.parameterization.scaled:
            # One is added to every count, so that unseen tokens have finite biases.
            share = counts.double().add(1)
            tokens = (share / share.mean()).log()
            self.bias[: len(tokens)] = tokens.to(self.bias)
