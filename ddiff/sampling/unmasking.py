"""Unmasking where the network is surest: heuristics that choose positions by their next conditional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, final, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError, suggest
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, draw_tokens, draw_uniforms
from ddiff.sampling.loop import (
    Canvas,
    Predicts,
    Quality,
    RngAt,
    Sampler,
    require_distribution,
    require_process,
    step_rows,
)
from ddiff.sampling.shaping import next_log_p, unfiltered

TIE = 2.0**12  # nats, or probabilities, that differ by less than one in so many are equal

Sureness = Literal["confidence", "top", "margin", "entropy"]


@final
class UnmaskingSampler(GridSampler):
    """Every open position draws its next state down; only the surest ones keep it. Heuristic.

    At time s a share s of all descents is left over, so the grid sets the budget (arXiv 2202.04200, cosine). `by`:
    confidence, ln p of what was drawn; top, ln p of the likeliest; margin, between the two likeliest (arXiv 2502.06768);
    entropy, its negative. Always of the unfiltered law. `noise` >= 0 adds noise * s * Gumbel. Needs a monotone process.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(
        self, grid: Steps | int = 64, by: Sureness = "confidence", noise: float = 0.0
    ) -> None:
        super().__init__(grid)
        if by not in get_args(Sureness):
            raise ArgumentError(
                f"UnmaskingSampler: by must be one of {', '.join(get_args(Sureness))}; got {by!r}."
                + suggest(by, get_args(Sureness))
            )
        if not 0.0 <= noise < float("inf"):
            raise ArgumentError(
                f"UnmaskingSampler: noise must be a finite number, 0 or more; got {noise}."
            )
        self.by, self.noise = by, noise

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        noise: CounterRng,
    ) -> Canvas:
        drawn, sureness = propose_descents(process, network, canvas, noise, self.by)
        gumbel = (
            -(-draw_uniforms(noise, "gumbel", 1)[:, 0].clamp(min=2.0**-54).log())
            .log()
            .reshape(s.shape)
        )
        sureness = sureness + self.noise * s * gumbel
        share = torch.where(canvas.free, s, 0.0).amax(-1)
        budget = (
            count_descents_left(process, canvas)
            - (process.vocabulary.num_levels * canvas.free.sum(-1) * share).floor().long()
        )
        best = rank_by_confidence(sureness, noise).argsort(dim=-1)
        chosen = (best < budget.unsqueeze(-1)) & process.active(canvas.zt) & canvas.free
        return canvas.advance(torch.where(chosen, drawn, canvas.zt), s)


@final
class EntropyBoundSampler(Sampler):
    """As many positions a step as the summed entropy without the largest stays within `bound` nats. Heuristic.

    Positions are taken by rising entropy of their next conditional; that sum bounds what drawing them independently can
    lose (arXiv 2505.24857). At least one position moves, so there are never more steps than descents; the network is told
    the share of descents that is left as its time. Needs a monotone process.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, bound: float = 0.1) -> None:
        if not 0.0 <= bound < float("inf"):
            raise ArgumentError(
                f"EntropyBoundSampler: bound must be a finite number of nats, 0 or more; got {bound}."
            )
        self.bound = bound

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        total = (process.vocabulary.num_levels * canvas.free.sum(-1)).clamp(min=1)
        for k in range(int(count_descents_left(process, canvas).max())):
            is_open = process.active(canvas.zt) & canvas.free
            if not bool(is_open.any()):
                break
            drawn, sureness = propose_descents(process, network, canvas, rng_at(k), "entropy")
            order = rank_by_confidence(sureness, rng_at(k))
            entropy = -sureness.gather(-1, order)
            held = entropy.masked_fill(entropy.isinf(), 0.0)
            ranked = held.cumsum(-1) - held <= self.bound
            within = ranked.scatter(-1, order, ranked)
            canvas = canvas.advance(torch.where(within & is_open, drawn, canvas.zt), canvas.t)
            canvas = canvas.advance(
                canvas.zt,
                (count_descents_left(process, canvas) / total)
                .double()
                .unsqueeze(-1)
                .expand_as(canvas.t),
            )
            yield canvas
        if not process.closes_at_clean:
            yield draw_tokens(
                process, network, canvas, rng_at(process.vocabulary.num_levels * canvas.zt.shape[1])
            )


def count_descents_left(process: ForwardProcess, canvas: Canvas) -> Tensor:
    """[B] descents that the free positions still have before them."""
    return torch.where(canvas.free, process.vocabulary.level_of(canvas.zt), 0).sum(-1)


def rank_by_confidence(sureness: Tensor, noise: CounterRng) -> Tensor:
    """[B,L] positions by falling sureness [B,L], equal ones at random.

    Where all positions are masked they may all be equally sure, and what rounding makes of that depends on the batch.
    """
    shuffled = noise.uniform("tie").argsort(dim=-1)
    rounded = (sureness * TIE).round().gather(-1, shuffled)
    return shuffled.gather(-1, rounded.argsort(dim=-1, descending=True, stable=True))


def propose_descents(
    process: ForwardProcess, network: Network, canvas: Canvas, noise: CounterRng, by: Sureness
) -> tuple[Tensor, Tensor]:
    """What every open position would draw one level down [B,L], and how sure that is [B,L], -inf elsewhere."""
    u = draw_uniforms(noise, "descent", 1)[:, 0]
    sureness = torch.full_like(canvas.t, -torch.inf).reshape(-1)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        below = process.vocabulary.level_of(zt) - 1

        def descend(
            dist: CleanDistribution, node: Tensor, below: Tensor, u: Tensor
        ) -> tuple[Tensor, Tensor]:
            drawn = dist.draw(node, below, u)
            return drawn, _sureness(unfiltered(dist), node, below, drawn, by)

        scope = process.scope(zt)
        drawn, sureness[rows] = query(
            torch.arange(len(zt), device=zt.device), scope, descend, zt, below, u[rows]
        )
        return drawn

    return step_rows(network, canvas, draw, process.active(canvas.zt)), sureness.reshape(
        canvas.t.shape
    )


def _sureness(
    dist: CleanDistribution, node: Tensor, below: Tensor, drawn: Tensor, by: Sureness
) -> Tensor:
    """[r] float64."""
    if by == "confidence":
        return dist.log_child(node, drawn).double()
    value = torch.zeros(len(node), dtype=torch.float64, device=node.device)
    for level in below.unique().tolist():
        rows = (below == level).nonzero().squeeze(-1)
        log_p = next_log_p(dist, node[rows], level, rows).double()
        if by == "entropy":
            value[rows] = torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)
        elif by == "top":
            value[rows] = log_p.amax(-1)
        else:
            two = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf).topk(2, -1).values.exp()
            value[rows] = two[:, 0] - two[:, 1]
    return value


def require_monotone(sampler: object, process: ForwardProcess | None, predicts: Predicts) -> None:
    require_process(sampler, process)
    require_distribution(sampler, predicts)
    if process is not None and not process.is_monotone:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be monotone, its reverse moves revealing and nothing else (masks, "
            f"trees with sure parents); {type(process).__name__} may change what it has shown, so that none is ever done. "
            "Use ancestral, tau_leaping, psi or self_correction."
        )
