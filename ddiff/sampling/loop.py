"""Sampling loop: draw sequences with a sampler, step by step, from t = 1 to t = 0.

At t = 1 states are draws from the prior, at t = 0 they are tokens. A step goes from t to s < t.
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
"""Name of the extra with the sum of negative probabilities, which only scores produce."""


@dataclass(frozen=True)
class Canvas:
    """State of a batch of sequences during sampling.

    Attributes:
        zt: [B,L] states.
        t: [B,L] times, one for each position.
        clean: [B,L] bool, True at prompt tokens and finished tokens, which never change.
        free: [B,L] bool, True at positions that the sampler may change in the next step. Positions
            that are neither clean nor free stay at the prior.
        block: [1,L] or [B,L] long, block numbers for attention (see `Noisy`).
        extras: other tensors [B,L], by name, that a sampler passes from step to step.
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
        """Return a copy with states `zt` [B,L] and times `s` [B,L].

        Positions that are not `free` keep their times. `extras` are added to the extra tensors
        of the canvas, or replace those of the same name.
        """
        t = torch.where(self.free, s, self.t)
        return replace(self, zt=zt, t=t, extras={**self.extras, **extras})


class Sampler(ABC):
    """Base class of samplers, which turn a draw from the prior into tokens.

    `quality` says how close samples are to the data distribution if the network is exact:

    - "exact": samples follow the data distribution for any number of steps.
    - "of an order": the total variation distance to the data distribution falls as 1/steps^order.
    - "heuristic": no convergence to the data distribution is proven.
    """

    quality: Quality = "heuristic"
    order: int = 0
    """Order of convergence in 1/steps. It is 0 unless the quality is "of an order"."""
    cached: bool = False
    """Finished positions attend to no later position, so keys and values can be cached."""
    looks_ahead: bool = True
    """Prompt tokens after a gap influence the tokens that are drawn in the gap.

    False for samplers from left to right: prompt tokens after a gap are kept, but the gap is drawn
    without attention to them.
    """
    keeps_extras: bool = False
    """Steps depend on `Canvas.extras`, so a step is not a function of the states and times only."""

    @property
    def steps(self) -> int | None:
        """Number of steps of `run`; None if the number depends on draws or the sequence length."""
        return None

    def check_supported(  # noqa: B027
        self,
        process: ForwardProcess | None,
        predicts: Predicts,
    ) -> None:
        """Raise ArgumentError if the sampler does not support the process or the prediction.

        `predicts` is the kind of prediction of the network, "distribution" or "score".
        """

    @abstractmethod
    def run(
        self,
        process: Any,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        """Sample from the state `canvas`, and yield the new canvas after each step.

        The last canvas has tokens at all positions that were free at the start. `rng_at(k)` is the
        random generator of step k = 0, 1, ...
        """


@dataclass(frozen=True)
class Samples:
    """Sampled tokens and the number of network evaluations.

    Attributes:
        ids: tokens [B,L].
        nfe: number of network evaluations for the batch. One evaluation may include any number of
            sequences.
        runs: [B], number of network evaluations that included each sequence.
        clamped_mass: [B], sum of the absolute values of negative probabilities that the sampler set
            to 0. It is 0 unless the network predicts a score.
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
    """Draw B sequences of `length` tokens with a sampler.

    Args:
        sampler: the sampling method.
        process: the process that `network` was trained to reverse; None for autoregression.
        network: function from the noisy batch to a `Query`, which evaluates the head. `as_network`
            makes such a function from a denoiser.
        index: [B] long, sample numbers. A sample depends only on its number and on `seed`, not on
            the other samples of the batch.
        length: number L of positions.
        prompt: [B,L] token ids, which are kept at the positions where `prompt_mask` is True.
        prompt_mask: [B,L] bool.
        on_step: called as on_step(k, canvas) after every step k = 1, 2, ..., where `canvas` is the
            state of the batch.

    Raises ArgumentError if `prompt` or `prompt_mask` has another shape, if a prompt id is not a
    token, or if the sampler does not support the process or the prediction.
    """
    batch = len(index)
    counted = count_evaluations(network)
    sampler.check_supported(process, counted.predicts)

    def rng_at(step: int) -> CounterRng:
        return CounterRng(seed, step, index, length, "sample")

    # The network may have been evaluated before, so its earlier evaluations are subtracted.
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
    network: Network,
    canvas: Canvas,
    draw: DrawRows,
    among: Tensor | None = None,
) -> Tensor:
    """Draw new states at free positions, and return the states of all positions [B,L].

    Args:
        canvas: state of the batch; `canvas.free` marks the free positions, those that the sampler
            may change.
        draw: draw(query, zt, t, rows) returns r new states. `rows` [r] are the flat positions
            b * L + i to draw, `zt` [r] their states and `t` [r] their times. Row k of `query` is
            the position rows[k].
        among: [B,L] bool. If given, only free positions where it is True are drawn.

    If there is no position to draw, the network is not evaluated.
    """
    chosen = canvas.free if among is None else canvas.free & among
    rows = chosen.reshape(-1).nonzero().squeeze(-1)
    states = canvas.zt.reshape(-1).clone()
    # The test costs a synchronization, but a network evaluation costs more.
    if len(rows):
        query = restrict(network(canvas.network_input()), rows)
        states[rows] = draw(query, states[rows], canvas.t.reshape(-1)[rows], rows)
    return states.reshape(canvas.zt.shape)


def draw_where(
    condition: Tensor,
    draw: Callable[..., Tensor],
    query: Query,
    zt: Tensor,
    *per_row: Tensor,
) -> Tensor:
    """Draw new states in the rows where a condition is True, and return the states [r] of all rows.

    Args:
        condition: [r] bool.
        draw: draw(query, zt, *per_row) returns the new states. It receives only the rows where the
            condition is True. If there is no such row, it is not called.
        zt: [r] current states, which are kept where the condition is False.
        per_row: other tensors with r rows that `draw` needs.
    """
    rows = condition.nonzero().squeeze(-1)
    states = zt.clone()
    if len(rows):
        values = [value[rows] for value in per_row]
        states[rows] = draw(restrict(query, rows), zt[rows], *values)
    return states


def restrict(query: Query, rows: Tensor) -> Query:
    """Return a query on a subset of rows: row k of the result is row `rows[k]` of `query`."""

    def restricted(chosen: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return query(rows[chosen], node, fn, *per_row)

    return restricted


def query_at_root(
    query: Query,
    process: ForwardProcess,
    fn: RowFunction,
    zt: Tensor,
    *per_row: Tensor,
) -> Any:
    """Evaluate fn(prediction, zt, *per_row) at every row, with predictions over all tokens.

    zt [r] are the states of the rows of `query`, and `per_row` are other tensors with r rows. The
    function `fn` is called for chunks of the rows; its results for all rows are returned.
    """
    rows = torch.arange(len(zt), device=zt.device)
    root = torch.full_like(zt, process.vocabulary.root)
    return query(rows, root, fn, zt, *per_row)


def require_process(sampler: object, process: ForwardProcess | None) -> None:
    """Raise ArgumentError with the name of the sampler if `process` is None."""
    if process is None:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be a forward process; this run has none. "
            'Without a process use the sampler "left_to_right".'
        )


def check_predicts_distribution(sampler: object, predicts: Predicts) -> None:
    """Raise ArgumentError with the name of the sampler unless the network predicts a distribution.

    `predicts` is the kind of prediction of the network.
    """
    if predicts != "distribution":
        raise ArgumentError(
            f"{type(sampler).__name__}: the denoiser must predict a distribution of the clean "
            "token; this denoiser predicts a score, from which no token can be drawn. "
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
    """Return the state of the batch at t = 1, before the first step.

    Positions where `prompt_mask` is True have the tokens of the prompt. The other positions have
    draws from the prior of the process, or token 0 if there is no process.
    """
    shape = (len(index), length)
    times = torch.ones(shape, dtype=torch.float64, device=index.device)
    if process is None:
        prior = torch.zeros_like(times, dtype=torch.long)
    else:
        prior = process.prior.draw(rng.uniform("start"))
    if prompt_mask is not None and prompt is None:
        raise ArgumentError(
            "generate: prompt_mask needs prompt, the tokens to keep where prompt_mask is True.",
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
    process: ForwardProcess | None,
    prompt: Tensor,
    prompt_mask: Tensor,
    shape: tuple[int, int],
) -> None:
    """Raise ArgumentError if a prompt cannot be used for samples of shape `shape`.

    Prompt and mask must have this shape, and the ids where the mask is True must be tokens.
    """
    if prompt.shape != shape or prompt_mask.shape != shape:
        raise ArgumentError(
            f"generate: prompt and prompt_mask must have the shape [{shape[0]}, {shape[1]}] "
            f"(samples, length); got {tuple(prompt.shape)} and {tuple(prompt_mask.shape)}. "
            "If the prompt is longer than the samples, set a larger length."
        )
    tokens = prompt[prompt_mask]
    # Without a process the vocabulary is unknown, and only negative ids are refused.
    num_tokens = process.vocabulary.num_tokens if process else 2**62
    if bool(((tokens < 0) | (tokens >= num_tokens)).any()):
        raise ArgumentError(
            f"generate: prompt must hold tokens, ids 0..{num_tokens - 1}, where prompt_mask is "
            f"True; got ids from {int(tokens.min())} to {int(tokens.max())}. "
            "Set prompt_mask only where there is a token."
        )
