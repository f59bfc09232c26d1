"""Sampling loop: draw samples with a sampler, step by step, from t = 1 to t = 0.

At t = 1 states are draws from the prior, at t = 0 they are tokens or clean vectors. A step goes
from t to s < t. Shapes: B samples with L positions; the states are tokens [B,L] or vectors of d
numbers [B,L,d].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ddiff.core.elbo import Network, choose_states
from ddiff.core.field import FieldProcess
from ddiff.core.network import CountingNetwork, Predicts, count_evaluations
from ddiff.core.process import ForwardProcess, Query, RowFunction, States
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError

Quality = Literal["exact", "of an order", "heuristic"]
RngAt = Callable[[int], CounterRng]
OnStep = Callable[[int, "Canvas"], None]
DrawRows = Callable[[Query, Tensor, Tensor, Tensor], Tensor]
"""draw(query, zt [r] or [r,d], t [r], rows [r]) -> new states in the shape of zt.

`rows` are flat positions b * L + i.
"""

CLAMPED_MASS = "clamped_mass"
"""Name of the extra with the sum of negative probabilities, which only scores produce."""


ADVICE: Mapping[States, str] = {
    "tokens": 'Use a sampler of vectors, such as "ddim" or "heun".',
    "vectors": 'Use a sampler of tokens, such as "ancestral".',
}
"""Advice in place of a sampler of tokens or of vectors."""

PREDICTED: Mapping[Predicts, str] = {
    "distribution": "a distribution of tokens",
    "score": "a score of tokens",
    "mean": "the mean of a vector",
}


@dataclass(frozen=True)
class Canvas:
    """State of a batch of samples during sampling.

    Attributes:
        zt: states, tokens [B,L] or vectors [B,L,d].
        t: [B,L] times, one for each position.
        clean: [B,L] bool, True at given and finished positions, which never change.
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

    def __post_init__(self) -> None:
        shape = self.zt.shape[:2]
        for name in ("t", "clean", "free"):
            _check_shape(f"Canvas: {name}", getattr(self, name), shape)

    def network_input(self) -> Noisy:
        """Return the input of the network, in which clean positions have time 0."""
        return Noisy(self.zt, torch.where(self.clean, 0.0, self.t), self.clean, self.block)

    def advance(self, zt: Tensor, s: Tensor, **extras: Tensor) -> Canvas:
        """Return a copy with states `zt` and times `s` [B,L].

        Positions that are not `free` keep their times. `extras` are added to the extra tensors
        of the canvas, or replace those of the same name.
        """
        _check_shape("Canvas.advance: s", s, self.t.shape)
        t = torch.where(self.free, s, self.t)
        return replace(self, zt=zt, t=t, extras={**self.extras, **extras})


class Sampler(ABC):
    """Base class of samplers, which turn a draw from the prior into a clean sample.

    `states` says whether the sampler moves tokens or vectors. `quality` says how close samples are
    to the data distribution if the network is exact:

    - "exact": samples follow the data distribution for any number of steps.
    - "of an order": the total variation distance to the data distribution falls as 1/steps^order.
    - "heuristic": no convergence to the data distribution is proven.
    """

    states: States = "tokens"
    """States that the sampler moves. Processes and predictions of other states are refused."""
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

    def check_supported(
        self,
        process: Any,
        predicts: Predicts,
    ) -> None:
        """Raise ArgumentError if the sampler does not support the process or the prediction.

        `process` is a `ForwardProcess` or a `GaussianProcess`, or None for a model without a
        process. `predicts` is the kind of prediction of the network. The base class refuses states
        that the sampler does not move.
        """
        require_states(self, process, predicts)

    def start_at(self, time: float) -> Sampler:
        """Return a copy that samples from the time `time` to 0, in as many steps as this sampler.

        0 < time <= 1. Raises ArgumentError if the sampler chooses its own times.
        """
        raise ArgumentError(
            f"{type(self).__name__}: the sampler chooses its own times, so it cannot start at the "
            f"time {time:g} of a text that is partly noised. Use a sampler on a grid of times, "
            "such as ancestral, psi, tau_leaping or confidence."
        )

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
    """Samples and the number of network evaluations.

    Attributes:
        ids: tokens [B,L], or clean vectors [B,L,d] if the process moves vectors.
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
        count, length = self.ids.shape[:2]
        states = "tokens" if self.ids.dim() == 2 else f"vectors of {self.ids.shape[-1]} numbers"
        return f"Samples({count} sequences of {length} {states}; {self.nfe} network evaluations)"


def generate(
    sampler: Sampler,
    process: FieldProcess | None,
    network: Network,
    *,
    index: Tensor,
    length: int,
    seed: int | Sequence[int],
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Draw B sequences of `length` tokens or vectors with a sampler.

    Args:
        sampler: the sampling method.
        process: the process that `network` was trained to reverse; None for autoregression.
        network: function from the noisy batch to a `Query`, which evaluates the head. `as_network`
            makes such a function from a denoiser.
        index: [B] long, sample numbers. A sample depends only on its number and on `seed`, not on
            the other samples of the batch.
        length: number L of positions.
        seed: one seed for all samples, or a list of one seed per sample.
        prompt: token ids [B,L] or vectors [B,L,d], which are kept at the positions where
            `prompt_mask` is True.
        prompt_mask: [B,L] bool.
        on_step: called as on_step(k, canvas) after every step k = 1, 2, ..., where `canvas` is the
            state of the batch.

    Raises ArgumentError if `prompt` or `prompt_mask` has another shape, if a prompt id is not a
    token, if a number of a prompt is not finite, or if the sampler does not support the process or
    the prediction.
    """
    counted = count_evaluations(network, natural_prediction(process))
    require_states(sampler, process, counted.predicts)
    sampler.check_supported(process, counted.predicts)

    def rng_at(step: int) -> CounterRng:
        return CounterRng(seed, step, index, length, "sample")

    start = initial_canvas(process, rng_at(0), prompt, prompt_mask)
    return sample_from(start, sampler, process, counted, rng_at, on_step)


def sample_from(
    start: Canvas,
    sampler: Sampler,
    process: FieldProcess | None,
    counted: CountingNetwork,
    rng_at: RngAt,
    on_step: OnStep | None = None,
) -> Samples:
    """Run a sampler from the state `start`, and count the evaluations of the network.

    `counted` is the network, and `rng_at(k)` the random generator of step k. `generate` explains
    the other arguments.
    """
    batch = len(start.zt)
    # The network may have been evaluated before, so its earlier evaluations are subtracted.
    calls_before = counted.calls
    runs_before = counted.runs_of_batch(batch)
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
    """Draw new states at free positions, and return the states of all positions.

    Args:
        canvas: state of the batch; `canvas.free` marks the free positions, those that the sampler
            may change.
        draw: draw(query, zt, t, rows) returns r new states. `rows` [r] are the flat positions
            b * L + i to draw, `zt` [r] or [r,d] their states and `t` [r] their times. Row k of
            `query` is the position rows[k].
        among: [B,L] bool. If given, only free positions where it is True are drawn.

    The result has the shape of `canvas.zt`. If there is no position to draw, the network is not
    evaluated.
    """
    chosen = canvas.free
    if among is not None:
        _check_shape("step_rows: among", among, canvas.free.shape)
        chosen = chosen & among
    rows = chosen.reshape(-1).nonzero().squeeze(-1)
    states = canvas.zt.flatten(0, 1).clone()
    # The host waits here for the device, but a network evaluation takes longer.
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


def natural_prediction(process: FieldProcess | None) -> Predicts:
    """Return the prediction that a plain network makes for the states of the process."""
    return "mean" if process is not None and process.states == "vectors" else "distribution"


def require_states(
    sampler: object, process: FieldProcess | None, predicts: Predicts | None = None
) -> None:
    """Raise ArgumentError if a sampler of tokens is used for vectors, or the other way round.

    A sampler without the attribute `states` moves tokens. With `predicts` = None only the process
    is checked.
    """
    moved: States = getattr(sampler, "states", "tokens")
    name = type(sampler).__name__
    use = ADVICE[moved]
    if process is not None and process.states != moved:
        raise ArgumentError(
            f"{name}: this sampler moves {moved}, but {type(process).__name__} is a process of "
            f"{process.states}. {use}"
        )
    if predicts is None:
        return
    predicted: States = "vectors" if predicts == "mean" else "tokens"
    if predicted != moved:
        raise ArgumentError(
            f"{name}: this sampler moves {moved}, but the denoiser predicts {PREDICTED[predicts]}. "
            f"{use}"
        )


def require_process(sampler: object, process: FieldProcess | None) -> None:
    """Raise ArgumentError if there is no process, or if its states are not those of the sampler."""
    require_states(sampler, process)
    if process is None:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be a forward process; this run has none. "
            'Without a process use the sampler "left_to_right".'
        )


def check_predicts_distribution(sampler: object, predicts: Predicts) -> None:
    """Raise ArgumentError with the name of the sampler unless the network predicts a distribution.

    `predicts` is the kind of prediction of the network.
    """
    require_states(sampler, None, predicts)
    if predicts != "distribution":
        raise ArgumentError(
            f"{type(sampler).__name__}: the denoiser must predict a distribution of the clean "
            "token; this denoiser predicts a score, from which no token can be drawn. "
            "Use tau_leaping, analytic or trapezoidal, which need only rates."
        )


def initial_canvas(
    process: FieldProcess | None,
    rng: CounterRng,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
) -> Canvas:
    """Return the state of the batch at t = 1, before the first step.

    Positions where `prompt_mask` is True have the states of the prompt. The other positions have
    draws from the prior of the process, or token 0 if there is no process. Raises ArgumentError if
    `prompt` and `prompt_mask` do not fit; see `generate`.
    """
    shape = (len(rng.index), rng.length)
    times = torch.ones(shape, dtype=torch.float64, device=rng.index.device)
    if process is None:
        prior = torch.zeros_like(times, dtype=torch.long)
    else:
        prior = process.prior.draw_positions(rng, "start")
    if prompt_mask is not None and prompt is None:
        raise ArgumentError(
            "generate: prompt_mask needs prompt, the tokens to keep where prompt_mask is True.",
        )
    if prompt_mask is None:
        prompt_mask = torch.zeros(shape, dtype=torch.bool, device=times.device)
    if prompt is None:
        prompt = prior
    _check_prompt(process, prompt, prompt_mask, prior.shape)
    return Canvas(
        zt=choose_states(prompt_mask, prompt, prior),
        t=torch.where(prompt_mask, 0.0, times),
        clean=prompt_mask,
        free=~prompt_mask,
    )


def _check_prompt(
    process: FieldProcess | None,
    prompt: Tensor,
    prompt_mask: Tensor,
    shape: torch.Size,
) -> None:
    """Raise ArgumentError if a prompt cannot be used for samples of shape `shape`.

    The prompt must have this shape, [B,L] or [B,L,d], and the mask the shape [B,L]. Where the mask
    is True, ids must be tokens, and numbers of vectors must be finite.
    """
    if prompt.shape != shape or prompt_mask.shape != shape[:2]:
        sizes = "samples, length" if len(shape) == 2 else "samples, length, numbers per vector"
        raise ArgumentError(
            f"generate: prompt must have the shape {list(shape)} ({sizes}) and prompt_mask the "
            f"shape {list(shape[:2])}; got {tuple(prompt.shape)} and {tuple(prompt_mask.shape)}. "
            "If the prompt is longer than the samples, set a larger length."
        )
    given = prompt[prompt_mask]
    if process is not None and process.states == "vectors":
        if not bool(given.isfinite().all()):
            raise ArgumentError(
                "generate: prompt must hold finite numbers where prompt_mask is True; got NaN or "
                "an infinite number."
            )
        return
    # Without a process the vocabulary is unknown, and only negative ids are refused.
    num_tokens = cast(ForwardProcess, process).vocabulary.num_tokens if process else 2**62
    if bool(((given < 0) | (given >= num_tokens)).any()):
        raise ArgumentError(
            f"generate: prompt must hold tokens, ids 0..{num_tokens - 1}, where prompt_mask is "
            f"True; got ids from {int(given.min())} to {int(given.max())}. "
            "Set prompt_mask only where there is a token."
        )


def _check_shape(what: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raise ArgumentError if a tensor per position has another shape than [B,L].

    torch would broadcast a tensor [B] to [B,L] along the wrong dimension if B equals L.
    """
    if tensor.shape != shape:
        raise ArgumentError(
            f"{what} must be {list(shape)}, one entry per position; got {list(tensor.shape)}."
        )
