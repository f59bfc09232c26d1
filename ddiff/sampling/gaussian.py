"""Samplers of vectors under a Gaussian process: DDIM, DDPM, probability flow and reverse SDE.

A network predicts the mean x_hat of the clean vector, given the state z_t = a x + sigma eps. The
predicted noise is eps_hat = (z_t - a x_hat) / sigma. Every sampler moves along a grid of times from
t = 1 to t = 0 and draws the clean vector there from the decoder of the process.

On a schedule with SNR(1) = 0 the slope of a may be infinite at t = 1. The first step of each
sampler is therefore a step of DDIM (or of DDPM, if the sampler draws noise), which needs no slope.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, final, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.field import FieldProcess
from ddiff.core.gaussian import GaussianProcess, to_normal
from ddiff.core.network import Predicts
from ddiff.core.numerics import LATEST, find_rows
from ddiff.core.process import Query, States
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import InformationGrid, Steps
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, require_states, step_rows

Last = Literal["draw", "mean"]

Move = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""move(x_hat [r,d], zt [r,d], t [r], s [r], rows [r]) -> z_s [r,d]; `rows` are flat positions."""


class GaussianSampler(GridSampler):
    """Base class of samplers of vectors under a `GaussianProcess`.

    The last step goes to t = 0, where the clean vector is drawn from the decoder of the process.

    Args:
        grid: a number of equal steps, or an object with the times: `Grid`, `InformationGrid` or
            `LogSnrGrid`.
        last: "draw" draws the clean vector from the decoder. "mean" takes the mean of the decoder,
            or for data on a grid of values the most likely value.
    """

    states: States = "vectors"

    def __init__(self, grid: Steps | int = 64, last: Last = "draw") -> None:
        super().__init__(grid)
        if last not in get_args(Last):
            raise ArgumentError(
                f'{type(self).__name__}: last must be "draw" or "mean"; got {last!r}.'
            )
        self.last = last

    def check_supported(self, process: FieldProcess | None, predicts: Predicts) -> None:
        if process is None:
            raise ArgumentError(
                f"{type(self).__name__}: process must be a Gaussian process; this run has none. "
                "A model without a process is sampled from left to right."
            )
        require_states(self, process, predicts)

    @abstractmethod
    def move(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        """Return the canvas at times s [B,n], 0 <= s <= t. Positions with s = t do not change."""

    def finish(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        rng: CounterRng,
    ) -> Canvas:
        canvas = self.move(process, network, canvas, torch.zeros_like(canvas.t), rng)
        rows = find_rows(canvas.free.reshape(-1))
        states = canvas.zt.flatten(0, 1).clone()
        if self.last == "mean":
            states[rows] = process.decode_most_likely(states[rows])
        else:
            u = draw_uniforms(rng, "last", process.uniforms_per_decode)
            t = canvas.t.reshape(-1)[rows]
            states[rows] = process.decode(_refuse_query, states[rows], t, u[rows])
        return canvas.advance(states.reshape(canvas.zt.shape), canvas.t)


@final
class DdimSampler(GaussianSampler):
    """Draw z_s from the posterior of the process given x_hat, with a share of its noise. Order 1.

    z_s = a_s x_hat + sqrt(sigma_s^2 - w^2) eps_hat + w n, with standard normal n and
    w = eta sigma_s sqrt(1 - SNR(t) / SNR(s)). eta = 0 is deterministic (DDIM, arXiv 2010.02502) and
    solves the probability flow. eta = 1 is the exact posterior q(z_s | z_t, x_hat) (DDPM, arXiv
    2006.11239). The error comes from the change of x_hat within a step. If x_hat does not depend on
    the state, one step is exact.

    Args:
        grid: see `GaussianSampler`.
        eta: share of the noise, in [0,1].
        last: see `GaussianSampler`.
    """

    def __init__(self, grid: Steps | int = 64, eta: float = 0.0, last: Last = "draw") -> None:
        super().__init__(grid, last)
        if not 0.0 <= eta <= 1.0:
            raise ArgumentError(
                f"DdimSampler: eta must be in [0, 1]; got {eta}. 0 is DDIM and 1 is DDPM."
            )
        self.eta = eta

    def move(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        normals = _draw_normals(process, rng) if self.eta > 0.0 else None

        def step(clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
            mean, deviation = process.posterior(clean, zt, t, s, self.eta)
            if normals is None:
                return mean
            return mean + deviation.unsqueeze(-1) * normals[rows]

        return canvas.advance(_move_rows(process, network, canvas, s, step), s)


@final
class EulerSampler(GaussianSampler):
    """Euler steps on the probability flow, z_s = z_t + (s - t) dz/dt. Order 1.

    dz/dt = a' x_hat + sigma' eps_hat (arXiv 2011.13456, eq. 13). If the slope of a is infinite at
    t = 1 (`SigmoidVP`), the order is lower; use `DdimSampler`.
    """

    def move(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        def step(clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
            moved = zt + (s - t).unsqueeze(-1) * process.velocity(clean, zt, t)
            return _replace_first_step(process, moved, clean, zt, t, s)

        return canvas.advance(_move_rows(process, network, canvas, s, step), s)


@final
class HeunSampler(GaussianSampler):
    """Heun steps on the probability flow: the mean of dz/dt at both ends of a step. Order 2.

    The second value is evaluated at the result of an Euler step, so a step takes two network
    evaluations (arXiv 2206.00364, algorithm 1). If the slope of a is infinite at t = 1
    (`SigmoidVP`), the order is lower. On an `InformationGrid` the order is 1 for any usual number
    of steps: where SNR is small, equal steps of information time are long steps of t.
    """

    order = 2

    def __init__(self, grid: Steps | int = 64, last: Last = "draw") -> None:
        super().__init__(grid, last)
        if isinstance(grid, InformationGrid):
            self.order = 1

    def move(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        start_zt = canvas.zt.flatten(0, 1)
        start_t = canvas.t.reshape(-1)
        start_clean = torch.zeros_like(start_zt, dtype=torch.float64)

        def predict(clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
            start_clean[rows] = clean
            moved = zt + (s - t).unsqueeze(-1) * process.velocity(clean, zt, t)
            return _replace_first_step(process, moved, clean, zt, t, s)

        def correct(clean: Tensor, zs: Tensor, s: Tensor, _: Tensor, rows: Tensor) -> Tensor:
            zt = start_zt[rows]
            t = start_t[rows]
            first = process.velocity(start_clean[rows], zt, t)
            second = process.velocity(clean, zs, s)
            moved = zt + (s - t).unsqueeze(-1) * (first + second) / 2.0
            # From SNR = 0, DDIM with the mean of both predictions, whose error is of second order.
            middle = (start_clean[rows] + clean) / 2.0
            return _replace_first_step(process, moved, middle, zt, t, s)

        moves = s < canvas.t
        predicted = canvas.advance(_move_rows(process, network, canvas, s, predict), s)
        zs = _move_rows(process, network, predicted, s, correct, moves)
        return predicted.advance(zs, s)


@final
class EulerMaruyamaSampler(GaussianSampler):
    """Euler-Maruyama steps on the reverse stochastic differential equation. Order 1.

    z_s = z_t + (s - t) (dz/dt + g^2 eps_hat / (2 sigma)) + g sqrt(t - s) n, with the velocity dz/dt
    of the probability flow, the rate g^2 = -sigma^2 d log SNR / dt at which the process adds noise,
    and standard normal n (arXiv 2011.13456, eq. 6).
    """

    def move(
        self,
        process: GaussianProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        normals = _draw_normals(process, rng)

        def step(clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
            sigma = process.deviation(t).unsqueeze(-1)
            noise = (zt - process.signal(t).unsqueeze(-1) * clean) / sigma
            rate = process.noise_rate(t).unsqueeze(-1)
            span = (t - s).unsqueeze(-1)
            drift = process.velocity(clean, zt, t) + rate * noise / (2.0 * sigma)
            moved = zt - span * drift + (rate * span).sqrt() * normals[rows]
            return _replace_first_step(process, moved, clean, zt, t, s, normals[rows])

        return canvas.advance(_move_rows(process, network, canvas, s, step), s)


def _move_rows(
    process: GaussianProcess,
    network: Network,
    canvas: Canvas,
    s: Tensor,
    move: Move,
    among: Tensor | None = None,
) -> Tensor:
    """Predict x_hat at free positions with s < t, or at those in `among`, and move them."""
    flat_s = s.reshape(-1)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        every = torch.arange(len(rows), device=rows.device)
        clean = process.predict(query, every, zt)
        return move(clean, zt, t, flat_s[rows], rows)

    return step_rows(network, canvas, draw, s < canvas.t if among is None else among)


def _draw_normals(process: GaussianProcess, rng: CounterRng) -> Tensor:
    """Draw standard normal numbers [B*n,d] for all flat positions."""
    return to_normal(draw_uniforms(rng, "step", process.width))


def _replace_first_step(
    process: GaussianProcess,
    moved: Tensor,
    clean: Tensor,
    zt: Tensor,
    t: Tensor,
    s: Tensor,
    normals: Tensor | None = None,
) -> Tensor:
    """Return `moved` [r,d], but rows with SNR(t) = 0 move by DDIM, or by DDPM with `normals`."""
    if not process.closes_at_prior:
        return moved
    mean, deviation = process.posterior(clean, zt, t, s, 0.0 if normals is None else 1.0)
    if normals is not None:
        mean = mean + deviation.unsqueeze(-1) * normals
    # A time rule may stand for t = 1 by the last interior time.
    return torch.where((t >= LATEST).unsqueeze(-1), mean, moved)


def _refuse_query(*arguments: object) -> Tensor:
    raise AssertionError("the decoder of a Gaussian process at t = 0 uses no network")
