"""Sampling loop: a sampler advances a canvas step by step; prompts are kept, evaluations counted.

Time runs from t = 1 (a draw from the prior) to t = 0 (tokens); a step goes from t to s < t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts, count_evaluations
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError

Quality = Literal["exact", "of an order", "heuristic"]
RngAt = Callable[[int], CounterRng]
OnStep = Callable[[int, "Canvas"], None]
DrawRows = Callable[[Query, Tensor, Tensor, Tensor], Tensor]
"""draw(query, zt [r], t [r], rows [r]) -> [r] new states; `rows` are flat positions b * L + i."""

CLAMPED_MASS = "clamped_mass"
"""Name of the extra in which samplers that read a score sum the negative probability."""


@dataclass(frozen=True)
class Canvas:
    """Sequences while they are sampled: states zt [B,L] and the time t [B,L] of each position.

    `clean` [B,L] bool: prompt or finished tokens, which never change. `free` [B,L] bool: positions
    that may change now. Positions that are neither stay at the prior. `block` [1 or B,L] long
    numbers blocks for attention (`Noisy`). `extras` are [B,L] tensors by name that a sampler keeps
    from step to step.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor
    free: Tensor
    block: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def network_input(self) -> Noisy:
        """Return the input of the network, in which clean positions have time 0."""
        return Noisy(self.zt, torch.where(self.clean, 0.0, self.t), self.clean, self.block)

    def advance(self, zt: Tensor, s: Tensor, **extras: Tensor) -> Canvas:
        """Return the canvas with states zt [B,L] and free positions at time s [B,L]."""
        t = torch.where(self.free, s, self.t)
        return replace(self, zt=zt, t=t, extras={**self.extras, **extras})


class Sampler(ABC):
    """Base class of samplers: from a draw of the prior to tokens.

    `quality` holds if the network is right. "exact": samples have the distribution of the network,
    whatever the number of steps. "of an order": the distance to it falls as 1/steps^order.
    "heuristic": neither is proven.
    """

    quality: Quality = "heuristic"
    order: int = 0
    """Order of convergence; 0 unless the quality is "of an order"."""
    cached: bool = False
    """Finished positions attend to nothing that comes later, so keys and values can be cached."""
    looks_ahead: bool = True
    """Prompt tokens after a gap influence what is drawn into it.

    False for samplers that go from left to right: they keep such tokens, but draw the gap as if
    these were not there.
    """
    keeps_extras: bool = False
    """Steps depend on `Canvas.extras`, so a step cannot be measured from a canvas without them."""

    @property
    def steps(self) -> int | None:
        """Number of canvases that `run` yields; None if it depends on the draws or the length."""
        return None

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:  # noqa: B027
        """Raise ArgumentError if the sampler cannot work with this process or prediction."""

    @abstractmethod
    def run(
        self, process: Any, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        """Yield the canvas after each step; the last one holds tokens at free positions.

        Step k draws its uniforms from `rng_at(k)`.
        """


@dataclass(frozen=True)
class Samples:
    """Drawn tokens and what they cost.

    ids [B,L] tokens. `nfe`: network evaluations of the batch. runs [B]: evaluations in which a
    sequence took part. clamped_mass [B]: probability that came out negative and was set to 0, in
    states per position (scores only).
    """

    ids: Tensor
    nfe: int
    runs: Tensor
    clamped_mass: Tensor

    def __repr__(self) -> str:
        count, length = self.ids.shape
        return f"Samples({count} sequences of {length} tokens; {self.nfe} network evaluations)"


def generate(
    sampler: Sampler,
    process: ForwardProcess | None,
    network: Network,
    *,
    index: Tensor,
    length: int,
    seed: int,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Draw one sequence of `length` tokens per entry of `index` [B].

    `index` numbers the samples: a sample depends on its number and the seed, not on its batch.
    Tokens of `prompt` [B,L] are kept where `prompt_mask` [B,L] is True, at any positions.
    `on_step(k, canvas)` is called with every canvas, k = 1, 2, ... Raises ArgumentError if the
    prompt does not fit, or the sampler does not support the process.
    """
    batch = len(index)
    counted = count_evaluations(network)
    sampler.check_supported(process, counted.predicts)

    def rng_at(step: int) -> CounterRng:
        return CounterRng(seed, step, index, length, "sample")

    # A network that counts may have been evaluated before.
    calls_before = counted.calls
    runs_before = counted.runs_of_batch(batch)
    start = _initial_canvas(process, rng_at(0), index, length, prompt, prompt_mask)
    canvas = start
    for step, canvas in enumerate(sampler.run(process, counted, start, rng_at), start=1):
        if on_step:
            on_step(step, canvas)
    return Samples(
        ids=canvas.zt,
        nfe=counted.calls - calls_before,
        runs=counted.runs_of_batch(batch) - runs_before,
        clamped_mass=canvas.extras.get(CLAMPED_MASS, torch.zeros_like(canvas.t)).sum(-1),
    )


def step_rows(
    network: Network, canvas: Canvas, draw: DrawRows, among: Tensor | None = None
) -> Tensor:
    """Return the states [B,L] after drawing the free positions, or those in `among` [B,L] bool.

    Calls `draw(query, zt [r], t [r], rows [r])`, where `rows` are flat positions b * L + i and row
    k of the query is `rows[k]`. Without such positions the network is not evaluated.
    """
    chosen = canvas.free if among is None else canvas.free & among
    rows = chosen.reshape(-1).nonzero().squeeze(-1)
    states = canvas.zt.reshape(-1).clone()
    if len(rows):
        query = restrict(network(canvas.network_input()), rows)
        states[rows] = draw(query, states[rows], canvas.t.reshape(-1)[rows], rows)
    return states.reshape(canvas.zt.shape)


def restrict(query: Query, rows: Tensor) -> Query:
    """Restrict a query to some rows and renumber them: row k of the result is `rows[k]`."""

    def restricted(chosen: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return query(rows[chosen], node, fn, *per_row)

    return restricted


def query_at_root(
    query: Query, process: ForwardProcess, fn: RowFunction, zt: Tensor, *per_row: Tensor
) -> Any:
    """Evaluate `fn(prediction, zt, *per_row)` at every row, with predictions over all tokens."""
    rows = torch.arange(len(zt), device=zt.device)
    root = torch.full_like(zt, process.vocabulary.root)
    return query(rows, root, fn, zt, *per_row)


def require_process(sampler: object, process: ForwardProcess | None) -> None:
    """Raise ArgumentError if there is no process."""
    if process is None:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be a forward process; this run has none. "
            "A model without a process is sampled from left to right."
        )


def require_distribution(sampler: object, predicts: Predicts) -> None:
    """Raise ArgumentError if the network predicts a score."""
    if predicts != "distribution":
        raise ArgumentError(
            f"{type(sampler).__name__}: the denoiser must predict a distribution of the clean "
            "token; this one predicts a score, from which no token can be drawn. "
            "Use tau_leaping, analytic or trapezoidal, which need only rates."
        )


def _initial_canvas(
    process: ForwardProcess | None,
    rng: CounterRng,
    index: Tensor,
    length: int,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
) -> Canvas:
    """Draw the prior at t = 1 (token 0 without a process) and put the prompt in."""
    shape = (len(index), length)
    times = torch.ones(shape, dtype=torch.float64, device=index.device)
    if process is None:
        prior = torch.zeros_like(times, dtype=torch.long)
    else:
        prior = process.prior.draw(rng.uniform("start"))
    if prompt_mask is not None and prompt is None:
        raise ArgumentError(
            "generate: prompt_mask needs prompt, the tokens to keep at those positions."
        )
    if prompt_mask is None:
        prompt_mask = torch.zeros(shape, dtype=torch.bool, device=index.device)
    if prompt is None:
        prompt = prior
    _check_prompt(process, prompt, prompt_mask, shape)
    return Canvas(
        zt=torch.where(prompt_mask, prompt, prior),
        t=torch.where(prompt_mask, 0.0, times),
        clean=prompt_mask,
        free=~prompt_mask,
    )


def _check_prompt(
    process: ForwardProcess | None, prompt: Tensor, prompt_mask: Tensor, shape: tuple[int, int]
) -> None:
    """Raise ArgumentError if a prompt does not have the shape, or holds no tokens at its mask."""
    if prompt.shape != shape or prompt_mask.shape != shape:
        raise ArgumentError(
            f"generate: prompt and prompt_mask must be [{shape[0]}, {shape[1]}] like the canvas; "
            f"got {tuple(prompt.shape)} and {tuple(prompt_mask.shape)}. "
            "A prompt longer than the canvas needs a larger length."
        )
    tokens = prompt[prompt_mask]
    num_tokens = process.vocabulary.num_tokens if process else 2**62
    if bool(((tokens < 0) | (tokens >= num_tokens)).any()):
        raise ArgumentError(
            f"generate: prompt must hold tokens, ids 0..{num_tokens - 1}, where prompt_mask is "
            f"True; got ids from {int(tokens.min())} to {int(tokens.max())}. "
            "Set prompt_mask only where there is a token."
        )
