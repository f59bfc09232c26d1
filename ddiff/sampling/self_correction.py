"""Self-correction: the changes that the network is surest of, until nothing is gained (arXiv 2503.04482)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.numerics import apply_temperature, draw_index
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.adaptive_correction import require_informed_tokens
from ddiff.sampling.grid_sampler import draw_uniforms, every_row, root_of
from ddiff.sampling.loop import Canvas, Predicts, Quality, RngAt, Sampler, step_rows


@final
class SelfCorrectingSampler(Sampler):
    """Rounds over the finished text: each word x' ~ P(x | z, rest)^(1/T), and the `commit` likeliest changes stay.

    Heuristic. The network is told the time `at`, as if that much noise were left. A sequence stops when nothing changes, or
    when for `patience` rounds no more of its words are the likeliest ones. Needs a process whose bound trains the law at
    words.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(
        self,
        inner: Sampler,
        rounds: int = 128,
        commit: int = 1,
        temperature: float = 0.1,
        at: float = 0.01,
        patience: int = 32,
    ) -> None:
        if (
            min(rounds, commit, patience) < 1
            or not 0.0 <= temperature < float("inf")
            or not 0.0 < at < 1.0
        ):
            raise ArgumentError(
                "SelfCorrectingSampler: rounds, commit and patience must be at least 1, temperature at least 0 and at in "
                f"(0, 1); got {rounds}, {commit}, {patience}, {temperature} and {at}."
            )
        self.inner, self.rounds, self.commit = inner, rounds, commit
        self.temperature, self.at, self.patience = temperature, at, patience
        self.looks_ahead = inner.looks_ahead

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)
        require_informed_tokens(self, process, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
            yield canvas
        going = canvas.free.any(-1)
        patient = _Patience(self.patience, going)
        for k in range(self.rounds):
            if not bool(going.any()):
                break
            shown = canvas.advance(canvas.zt, torch.full_like(canvas.t, self.at))
            drawn, score, right = propose_changes(
                process, network, shown, going, rng_at(k), self.temperature
            )
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            change = (rank < self.commit) & (drawn != canvas.zt)
            going = going & change.any(-1) & patient(right.sum(-1))
            canvas = canvas.advance(
                torch.where(change, drawn, canvas.zt), torch.zeros_like(canvas.t)
            )
            yield canvas


class _Patience:
    """Which sequences have gained within the last `rounds` rounds; told how many of their words [B] are the likeliest."""

    def __init__(self, rounds: int, going: Tensor) -> None:
        self.rounds, self.since = rounds, torch.zeros_like(going, dtype=torch.long)
        self.best = torch.full_like(self.since, -1)

    def __call__(self, agreeing: Tensor) -> Tensor:
        self.since = torch.where(agreeing > self.best, 0, self.since + 1)
        self.best = torch.maximum(self.best, agreeing)
        return self.since <= self.rounds


def propose_changes(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    going: Tensor,
    rng: CounterRng,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B,L] each: a draw, its ln p where it is new (else -inf), whether what stands is the likeliest word."""
    u = draw_uniforms(rng, "again", 1)[:, 0]
    score, right = (
        torch.full_like(canvas.t, -torch.inf).reshape(-1),
        torch.zeros_like(canvas.free).reshape(-1),
    )

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        def again(
            dist: CleanDistribution, z: Tensor, t: Tensor, u: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            full = dist.log_mass(0).double() + process.log_likelihood(z, t)
            tempered = apply_temperature(full, temperature).log_softmax(-1)
            drawn = draw_index(tempered.exp(), u)
            log_p = tempered.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            return drawn, log_p, full.argmax(-1) == z

        root = root_of(process, zt)
        drawn, log_p, right[rows] = query(every_row(zt), root, again, zt, t, u[rows])
        score[rows] = torch.where(drawn != zt, log_p, -torch.inf)
        return drawn

    drawn = step_rows(network, canvas, draw, going.unsqueeze(-1).expand_as(canvas.free))
    return drawn, score.reshape(canvas.t.shape), right.reshape(canvas.t.shape)
