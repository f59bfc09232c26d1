"""The theta-trapezoidal method: two stages, the second with extrapolated rates (arXiv 2502.00234)."""

from __future__ import annotations

from typing import final

from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms, every_row, root_of
from ddiff.sampling.loop import Canvas, Predicts, require_process, step_rows
from ddiff.sampling.tau_leaping import tau_leap


@final
class TrapezoidalSampler(GridSampler):
    """Leap theta of the step to z* with rates mu, then the rest with [a mu* - (a - 1) mu]_+, mu* the rates at z*.

    a = 1 / (2 theta (1 - theta)), theta in (0,1). Two network calls a step; needs reverse rates only. A position that
    moved in the first stage goes on with a mu*: from its new state it has no earlier rates to extrapolate from, and so
    both jumps within a step come with their second-order probability.

    Order 2 where the extrapolated rates stay positive, which is the paper's assumption, and are smooth in t; on masks the
    distance goes as ln N / N^2, for rates of 1/t. Where another position's draw makes a rate fall below (a - 1)/a of
    itself (a half for theta = 1/2), the negative rate is set to 0; where rates are infinite at t = 1 (noise that sets in
    as a root), the first step is far off. Then the order tends to 1 as N grows, from smaller distances than Euler's.
    """

    order = 2

    def __init__(self, grid: Steps | int = 64, theta: float = 0.5) -> None:
        super().__init__(grid)
        if not 0.0 < theta < 1.0:
            raise ArgumentError(f"TrapezoidalSampler: theta must be in (0, 1); got {theta}.")
        self.theta, self.ahead = theta, 0.5 / (theta * (1.0 - theta))

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        first, second = draw_uniforms(rng, "first", 2), draw_uniforms(rng, "second", 2)
        start_zt, start_t, then = canvas.zt.reshape(-1), canvas.t.reshape(-1), s.reshape(-1)
        start = network(canvas.network_input())
        rho = canvas.t - self.theta * (canvas.t - s)

        def early(rows: Tensor) -> Tensor:
            """Rates at the start of the step."""

            root = root_of(process, rows)
            return start(rows, root, process.reverse_rates, start_zt[rows], start_t[rows])

        def halfway(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            def jump(
                prediction: Prediction, z: Tensor, t: Tensor, rho: Tensor, u: Tensor
            ) -> Tensor:
                return tau_leap(process.reverse_rates(prediction, z, t), z, t - rho, u)

            root = root_of(process, zt)
            return query(every_row(zt), root, jump, zt, t, rho.reshape(-1)[rows], first[rows])

        def onward(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            def jump(prediction: Prediction, z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
                rates = self.ahead * process.reverse_rates(prediction, z, t)
                still = (z == start_zt[rows]).nonzero().squeeze(-1)
                earlier = (self.ahead - 1.0) * early(rows[still])
                rates[still] = (rates[still] - earlier).clamp(min=0.0)
                return tau_leap(rates, z, t - then[rows], second[rows])

            return query(every_row(zt), root_of(process, zt), jump, zt, t, rows)

        shared = lambda noisy: start  # noqa: E731
        middle = canvas.advance(step_rows(shared, canvas, halfway, process.active(canvas.zt)), rho)
        return middle.advance(step_rows(network, middle, onward, process.active(middle.zt)), s)
