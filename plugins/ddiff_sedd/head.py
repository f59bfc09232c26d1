"""A head that says how likely every state is beside the one that stands there (arXiv 2310.16834)."""

from __future__ import annotations

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

LATEST = 1.0 - 1e-12  # a ratio to the mask diverges where everything is masked

Question = Callable[[Any, Tensor], Any]


@final
class RatioDistribution(SubtreeDistribution):
    """Ratios [r,S] before their scale, and softmax over the words: what they say once the mask's noise is gone."""

    def __init__(self, raw: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, vocabulary.root)
        self.raw = raw

    def log_below(self, level: int) -> Tensor:
        words = self.raw[:, : self.vocabulary.num_tokens].log_softmax(-1)
        return words if level == 0 else words.logsumexp(-1, keepdim=True)


@final
@dataclass(frozen=True)
class Ratios:
    """Reads a `RatioDistribution` as a score: log s(y) = raw(y), 0 at z_t;
    if scaled, less ln V and ln(e^sigma - 1) at masks."""

    scaled: bool
    predicts: ClassVar[Literal["score"]] = "score"

    def prepared(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor:
        """[k] ln(V (e^sigma - 1)) at masks, 0 elsewhere; e^sigma - 1 is how likely the mask is beside all words."""
        scale = torch.zeros_like(t)
        masked = ((zt == process.vocabulary.root) & self.scaled).nonzero().squeeze(-1)
        if len(masked):
            num_tokens = process.vocabulary.num_tokens
            distinct, place = t[masked].clamp(max=LATEST).unique(return_inverse=True)
            even = torch.zeros(
                len(distinct), num_tokens, dtype=t.dtype, device=t.device
            ).log_softmax(-1)
            log_q = process.log_marginal(even, distinct)
            odds = (
                log_q[:, process.vocabulary.root]
                - log_q[:, :num_tokens].logsumexp(-1)
                + even[:, 0].neg()
            )
            scale[masked] = odds[place]
        return scale

    def question(
        self, fn: Question, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> Question:
        def question(dist: RatioDistribution, idx: Tensor) -> Any:
            own = zt[idx].unsqueeze(-1)
            log_ratio = dist.raw - prepared[idx].to(dist.raw.dtype).unsqueeze(-1)
            return fn(Score(log_ratio.scatter(-1, own, 0.0)), idx)

        return question

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        return torch.full_like(node, process.vocabulary.root)


@final
class ScoreHead(Head):
    """One logit per state: log s(y), read by `Ratios`. Scaled, it starts as the exact score of a law, unscaled at s = 1."""

    class Config(ComponentConfig):
        scaled: bool | None = None
        """Divide the ratios to the mask by V (e^sigma - 1); if not given, where there is a mask."""

    def __init__(self, vocabulary: Vocabulary, width: int, scaled: bool) -> None:
        if vocabulary.num_levels > 1:
            raise ArgumentError(
                f"The head score says ratios of words, and of a mask; got {vocabulary}. "
                'Use [vocabulary] kind = "flat", or a head that says a law: "tied" or "levelwise".'
            )
        if scaled and vocabulary.mask_id is None:
            raise ArgumentError(
                "The head score scales ratios to the mask, and this vocabulary has none: leave scaled out."
            )
        super().__init__(vocabulary, width, vocabulary.num_states)
        self.reading = Ratios(scaled)

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, width: int) -> ScoreHead:
        scaled = vocabulary.mask_id is not None if config.scaled is None else config.scaled
        return cls(vocabulary, width, scaled)

    def dist(self, logits: Callable[[int, int], Tensor], top: int) -> RatioDistribution:
        return RatioDistribution(logits(0, self.vocabulary.num_states), self.vocabulary)

    def logits_per_row(self, top: int) -> int:
        return self.vocabulary.num_states

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """Scaled: exp(bias)/V is the unigram law, so that the first score is that of it."""
        if self.reading.scaled:
            share = counts.double().add(1)
            words = (share / share.mean()).log()
            self.bias[: len(words)] = words.to(self.bias)
