"""Unmasking by confidence: heuristic samplers that choose which positions to reveal first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, final, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError, suggest
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, draw_tokens, draw_uniforms
from ddiff.sampling.loop import (
    Canvas,
    Quality,
    RngAt,
    Sampler,
    check_predicts_distribution,
    require_process,
    step_rows,
)
from ddiff.sampling.shaping import next_log_p, unshaped

# Confidences (nats or probabilities) are rounded to multiples of 1/RESOLUTION. Positions of equal
# rounded confidence are ranked at random.
RESOLUTION = 2.0**12

Criterion = Literal["confidence", "top", "margin", "entropy"]


@final
class UnmaskingSampler(GridSampler):
    """Heuristic sampler: draw a next state at every position, and keep the most confident draws.

    A descent is a move one level down the tree. With masks it is the move from the mask to a token.
    The grid of times sets the number of descents of a step: after the step to time s, a fraction s
    of all descents of a sequence remains (arXiv 2202.04200 uses a cosine grid). `by` selects the
    confidence, which is computed without temperature and filters:

    - confidence: ln p of the drawn state.
    - top: ln p of the most likely state.
    - margin: difference of the two largest probabilities (arXiv 2502.06768).
    - entropy: negative entropy.

    If `noise` > 0, the order is randomized: noise * s * g is added to each confidence, where g is a
    standard Gumbel variable. The process must be monotone: its reverse steps never change a
    revealed token.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(
        self,
        grid: Steps | int = 64,
        by: Criterion = "confidence",
        noise: float = 0.0,
    ) -> None:
        super().__init__(grid)
        if by not in get_args(Criterion):
            raise ArgumentError(
                f"UnmaskingSampler: by must be one of {', '.join(get_args(Criterion))}; "
                f"got {by!r}." + suggest(by, get_args(Criterion))
            )
        if not 0.0 <= noise < float("inf"):
            raise ArgumentError(
                f"UnmaskingSampler: noise must be a finite number, 0 or more; got {noise}.",
            )
        self.by = by
        self.noise = noise

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        drawn, confidence = propose_descents(process, network, canvas, rng, self.by)
        # The floor keeps ln u finite at u = 0.
        u = draw_uniforms(rng, "gumbel", 1)[:, 0].clamp(min=2.0**-54)
        gumbel = -(-u.log()).log().reshape(s.shape)
        confidence = confidence + self.noise * s * gumbel
        # The second argsort inverts the first: the rank of each position.
        rank = rank_by_confidence(confidence, rng).argsort(dim=-1)
        budget = self._count_descents(process, canvas, s)
        moves = (rank < budget.unsqueeze(-1)) & process.active(canvas.zt) & canvas.free
        return canvas.advance(torch.where(moves, drawn, canvas.zt), s)

    def _count_descents(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        """Return the number of descents [B] that a step to times s [B,L] makes in each sequence.

        A descent is a move one level down the tree.
        """
        # At the start all descents remain, also if sampling starts at a time below 1.
        fraction = torch.where(canvas.free, s, 0.0).amax(-1) / self.start
        total = process.vocabulary.num_levels * canvas.free.sum(-1)
        remaining = (total * fraction).floor().long()
        return count_descents_left(process, canvas) - remaining


@final
class EntropyBoundSampler(Sampler):
    """Heuristic sampler: each step moves the positions of lowest entropy, up to a limit.

    The entropy of a position, in nats, is that of the distribution from which its next state is
    drawn. A step takes positions in rising order of entropy, as long as the sum of all their
    entropies except the largest is at most `bound`. This sum limits the error of drawing the
    positions independently (arXiv 2505.24857).

    A descent is a move one level down the tree. Every step makes at least one descent in each
    unfinished sequence. The network is conditioned on the time t that equals the fraction of
    descents that remain. The process must be monotone: its reverse steps never change a revealed
    token.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, bound: float = 0.1) -> None:
        if not 0.0 <= bound < float("inf"):
            raise ArgumentError(
                "EntropyBoundSampler: bound must be a finite number of nats, 0 or more; "
                f"got {bound}."
            )
        self.bound = bound

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        num_levels = process.vocabulary.num_levels
        # If the prompt fills a sequence, it has no descents, and the minimum 1 avoids 0/0.
        total = (num_levels * canvas.free.sum(-1)).clamp(min=1)
        for k in range(int(count_descents_left(process, canvas).max())):
            is_open = process.active(canvas.zt) & canvas.free
            if not bool(is_open.any()):
                break
            drawn, confidence = propose_descents(process, network, canvas, rng_at(k), "entropy")
            moves = self._choose(confidence, rng_at(k)) & is_open
            canvas = canvas.advance(torch.where(moves, drawn, canvas.zt), canvas.t)
            s = (count_descents_left(process, canvas) / total).double()
            canvas = canvas.advance(canvas.zt, s.unsqueeze(-1).expand_as(canvas.t))
            yield canvas
        if not process.closes_at_clean:
            # No sequence reaches a step of this number, so its uniforms have not been used.
            last = num_levels * canvas.zt.shape[1]
            yield draw_tokens(process, network, canvas, rng_at(last))

    def _choose(self, confidence: Tensor, rng: CounterRng) -> Tensor:
        """Return a bool [B,L] that marks the positions to move in a step.

        `confidence` [B,L] is the negative entropy of each position, -inf at finished positions.
        """
        order = rank_by_confidence(confidence, rng)
        entropy = -confidence.gather(-1, order)
        # Finished positions have infinite entropy and rank last.
        entropy = entropy.masked_fill(entropy.isinf(), 0.0)
        # Entropies rise along the rank, so the sum without the largest entropy is the sum before
        # each position.
        is_within = entropy.cumsum(-1) - entropy <= self.bound
        return is_within.scatter(-1, order, is_within)


def count_descents_left(process: ForwardProcess, canvas: Canvas) -> Tensor:
    """Return the number of descents [B] that remain until all free positions have tokens.

    A descent is a move one level down the tree. Free positions are those in `canvas.free`.
    """
    return torch.where(canvas.free, process.vocabulary.level_of(canvas.zt), 0).sum(-1)


def rank_by_confidence(confidence: Tensor, rng: CounterRng) -> Tensor:
    """Return the positions [B,L] of each sequence, sorted by decreasing `confidence` [B,L].

    Equal confidences are in random order. Confidences are rounded first: those of masked positions
    may differ only by rounding errors, and rounding errors depend on the batch.
    """
    shuffled = rng.uniform("tie").argsort(dim=-1)
    rounded = (confidence * RESOLUTION).round().gather(-1, shuffled)
    return shuffled.gather(-1, rounded.argsort(dim=-1, descending=True, stable=True))


def propose_descents(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    rng: CounterRng,
    by: Criterion,
) -> tuple[Tensor, Tensor]:
    """Draw a state one level down the tree at every free position that is not yet a token.

    A free position is one in `canvas.free`. `by` selects the confidence (see `UnmaskingSampler`).
    Returns two tensors [B,L]:

    - the states, which are unchanged at all other positions,
    - the confidence of each draw, which is -inf at all other positions.
    """
    u = draw_uniforms(rng, "descent", 1)[:, 0]
    confidence = torch.full_like(canvas.t, -torch.inf).reshape(-1)

    def descend(
        dist: CleanDistribution,
        node: Tensor,
        below: Tensor,
        u: Tensor,
    ) -> tuple[Tensor, Tensor]:
        drawn = dist.draw(node, below, u)
        return drawn, _confidence(unshaped(dist), node, below, drawn, by)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        below = process.vocabulary.level_of(zt) - 1
        scope = process.scope(zt)
        every = torch.arange(len(zt), device=zt.device)
        drawn, confidence[rows] = query(every, scope, descend, zt, below, u[rows])
        return drawn

    drawn = step_rows(network, canvas, draw, process.active(canvas.zt))
    return drawn, confidence.reshape(canvas.t.shape)


def _confidence(
    dist: CleanDistribution,
    node: Tensor,
    below: Tensor,
    drawn: Tensor,
    by: Criterion,
) -> Tensor:
    """Return the confidence [r] float64 of draws of a child from its parent.

    Args:
        dist: distribution from which the children were drawn, without temperature and filters.
        node: [r] current states, the parents.
        below: [r] level of the children of each parent.
        drawn: [r] drawn children.
        by: kind of confidence (see `UnmaskingSampler`).
    """
    if by == "confidence":
        return dist.log_child(node, drawn).double()
    value = torch.zeros(len(node), dtype=torch.float64, device=node.device)
    for level in below.unique().tolist():
        rows = (below == level).nonzero().squeeze(-1)
        log_p = next_log_p(dist, node[rows], level, rows).double()
        if by == "entropy":
            # p ln p is 0 at p = 0, where the product would be NaN.
            value[rows] = torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)
        elif by == "top":
            value[rows] = log_p.amax(-1)
        else:
            # A second entry of probability 0, in case a level has a single node.
            padded = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)
            two = padded.topk(2, -1).values.exp()
            value[rows] = two[:, 0] - two[:, 1]
    return value


def require_monotone(sampler: object, process: ForwardProcess | None, predicts: Predicts) -> None:
    """Raise ArgumentError if reverse steps of the process may change a revealed token.

    The error message has the name of the sampler. The error is also raised if there is no process,
    or if the network predicts a score.
    """
    require_process(sampler, process)
    check_predicts_distribution(sampler, predicts)
    if process is not None and not process.is_monotone:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be monotone, which means that reverse steps "
            "never change a revealed token (masks, trees with deterministic parents); "
            f"{type(process).__name__} may change a token after it is revealed. "
            "Use ancestral, tau_leaping, psi or self_correction."
        )
