"""Self-correcting sampler: replaces tokens of finished samples (arXiv 2503.04482)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.numerics import apply_temperature, draw_index
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.adaptive_correction import require_informed_tokens
from ddiff.sampling.grid_sampler import draw_uniforms
from ddiff.sampling.loop import Canvas, Quality, RngAt, Sampler, query_at_root, step_rows


@final
class SelfCorrectingSampler(Sampler):
    """Heuristic sampler: sample with `inner`, then correct tokens in up to `rounds` rounds.

    Each round proposes a new token at every position, drawn from the full conditional P(x | z) with
    temperature `temperature`. Of the proposals that differ from the current token, the `commit`
    most likely ones in each sequence are accepted. The network is conditioned on the time t = `at`,
    although the tokens are already clean.

    The correction of a sequence ends when no token changes, or after more than `patience` rounds
    without improvement. Improvement means that the number of positions whose current token is the
    most likely one reaches a new maximum.

    The bound of the process must train the prediction at tokens, not only at masks (see
    `require_informed_tokens`).
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
        has_valid_counts = min(rounds, commit, patience) >= 1
        if not (has_valid_counts and 0.0 <= temperature < float("inf") and 0.0 < at < 1.0):
            raise ArgumentError(
                'SelfCorrectingSampler: "rounds", "commit" and "patience" must be at least 1, '
                '"temperature" must be finite and at least 0, and the time "at" must be in (0, 1); '
                f"got rounds = {rounds}, commit = {commit}, patience = {patience}, "
                f"temperature = {temperature}, at = {at}."
            )
        self.inner = inner
        self.rounds = rounds
        self.commit = commit
        self.temperature = temperature
        self.at = at
        self.patience = patience
        self.looks_ahead = inner.looks_ahead

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)
        require_informed_tokens(self, process, predicts)

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
            yield canvas
        is_active = canvas.free.any(-1)
        patience = _Patience(self.patience, is_active)
        for k in range(self.rounds):
            if not bool(is_active.any()):
                break
            noisy = canvas.advance(canvas.zt, torch.full_like(canvas.t, self.at))
            drawn, score, is_best = propose_changes(
                process,
                network,
                noisy,
                is_active,
                rng_at(k),
                self.temperature,
            )
            change = choose_changes(canvas.zt, drawn, score, self.commit)
            is_active = is_active & change.any(-1) & patience(is_best.sum(-1))
            zt = torch.where(change, drawn, canvas.zt)
            canvas = canvas.advance(zt, torch.zeros_like(canvas.t))
            yield canvas


class _Patience:
    """Early stopping, for each sequence: at most `rounds` rounds in a row without improvement."""

    def __init__(self, rounds: int, is_active: Tensor) -> None:
        self.rounds = rounds
        self.since = torch.zeros_like(is_active, dtype=torch.long)
        self.best = torch.full_like(self.since, -1)

    def __call__(self, num_best: Tensor) -> Tensor:
        """Count one round, and return a bool [B] that is False for sequences that should stop.

        `num_best` [B] is the number of positions whose current token is the most likely one. A
        sequence improves if this number is larger than in every earlier round. The sequence should
        stop after more than `rounds` rounds in a row without improvement.
        """
        self.since = torch.where(num_best > self.best, 0, self.since + 1)
        self.best = torch.maximum(self.best, num_best)
        return self.since <= self.rounds


def choose_changes(zt: Tensor, drawn: Tensor, score: Tensor, commit: int) -> Tensor:
    """Return a bool [B,L] that is True where a proposal of `propose_changes` is accepted.

    Of the proposals `drawn` [B,L] that differ from the tokens `zt` [B,L], the `commit` proposals of
    largest `score` [B,L] are accepted in each sequence.
    """
    # The second argsort inverts the first: the rank of each position.
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < commit) & (drawn != zt)


def propose_changes(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    is_active: Tensor,
    rng: CounterRng,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose a token at every free position of the sequences that `is_active` [B] marks.

    A free position is one in `canvas.free`. A proposal is drawn from the full conditional P(x | z)
    with temperature `temperature`. Returns three tensors [B,L]:

    - the proposed tokens,
    - ln p of each proposed token, or -inf if it equals the current token,
    - a bool that is True where the current token is the most likely one.
    """
    u = draw_uniforms(rng, "again", 1)[:, 0]
    score = torch.full_like(canvas.t, -torch.inf).reshape(-1)
    is_best = torch.zeros_like(canvas.free).reshape(-1)

    def propose(
        dist: CleanDistribution,
        z: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The current token is evidence for the clean token, so the temperature is applied to the
        # posterior, which includes this evidence.
        full = dist.log_mass(0).double() + process.log_likelihood(z, t)
        tempered = apply_temperature(full, temperature).log_softmax(-1)
        drawn = draw_index(tempered.exp(), u)
        log_p = tempered.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        return drawn, log_p, full.argmax(-1) == z

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        drawn, log_p, is_best[rows] = query_at_root(query, process, propose, zt, t, u[rows])
        score[rows] = torch.where(drawn != zt, log_p, -torch.inf)
        return drawn

    drawn = step_rows(network, canvas, draw, is_active.unsqueeze(-1).expand_as(canvas.free))
    return drawn, score.reshape(canvas.t.shape), is_best.reshape(canvas.t.shape)
