"""Sampling of several fields: text, vectors and images, along a path of times.

Sampling follows a path (`ddiff.core.paths`) from tau = 1, where every field is at its prior, to
tau = 0. A field begins to move at the stop of its leg, and is decoded at the start of its leg. From
then on it is clean. Until a field moves, it keeps its first draw from the prior: the bound only
assumes that this draw does not depend on the sample.

    sampler = JointSampler(
        {"text": AncestralSampler(64), "latent": DdimSampler(64)},
        first_path(["latent", "text"]),
    )
    samples = generate_fields(sampler, fields, network, index=torch.arange(8), seed=0)
    given = {"latent": (vectors, None)}             # text given a vector for every sample
    samples = generate_fields(sampler, fields, network, index=index, seed=0, given=given)

Shapes: B samples, n positions of a field; states are tokens [B,n] or vectors [B,n,d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, final, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.field import Field, Fields, rng_of_field
from ddiff.core.fields import JointNetwork, JointNoisy
from ddiff.core.network import Predicts
from ddiff.core.paths import HeldAt, Hold, Leg, LegPath, given_path
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import LoopGrid
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.hyperschedule import HyperscheduleSampler, move_positions
from ddiff.sampling.joint_network import (
    Guidance,
    GuidedJointNetwork,
    HeldNetwork,
    JointCounter,
    SharedState,
    check_guidance,
)
from ddiff.sampling.loop import (
    Canvas,
    Sampler,
    initial_canvas,
    natural_prediction,
    require_states,
)
from ddiff.sampling.shaping import ShapedSampler, shape_network

Update = Literal["jacobi", "gauss-seidel"]
Given = Mapping[str, tuple[Tensor, Tensor | None]]
"""Given states of fields: values [B,n] or [B,n,d], and a mask [B,n] bool (None: all positions)."""

JointCanvas = dict[str, Canvas]
OnJointStep = Callable[[int, Mapping[str, Canvas]], None]


@dataclass(frozen=True)
class JointSamples:
    """Samples of several fields and the number of network evaluations.

    Attributes:
        states: tokens [B,n] or clean vectors [B,n,d] of each field that was sampled or given.
        nfe: number of network evaluations of the batch. One evaluation serves all fields.
        runs: [B], number of evaluations in which each sample took part.
    """

    states: Mapping[str, Tensor]
    nfe: int
    runs: Tensor

    def __repr__(self) -> str:
        sizes = [f"{name} {list(states.shape)}" for name, states in self.states.items()]
        return f"JointSamples({', '.join(sizes)}; {self.nfe} network evaluations)"


@final
class JointSampler:
    """Sampler of several fields, each moved by its own sampler along a path.

    On a leg on which no other field moves, the sampler of the field runs as in `generate`, with its
    own times, while all other fields are held. If the time rule of the field has windows, a
    `GridSampler` follows the rule (`HyperscheduleSampler`).

    On legs that overlap, all fields move along one grid of tau, to the times of the path. Their
    samplers must be `GridSampler`s, which may be shaped by filters; the grids of these samplers are
    not used. With exact predictions the error falls as 1/steps.

    Args:
        samplers: sampler of each field that moves, by the name of the field.
        path: legs of the fields.
        steps: number of steps for tau from 1 to 0, on the parts of the path with overlapping legs.
            Every part between two starts or stops of legs has at least one step.
        update: "jacobi" moves all fields from the same joint state, with one network evaluation per
            step. "gauss-seidel" moves them one after the other, in the order of `samplers`, each
            from the newest states of the others, with one evaluation each.
        guidance: classifier-free guidance by the name of the guided field.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        path: LegPath,
        steps: int = 64,
        update: Update = "jacobi",
        guidance: Mapping[str, Guidance] | None = None,
    ) -> None:
        if steps < 1:
            raise ArgumentError(f"JointSampler: steps must be at least 1; got {steps}.")
        if update not in get_args(Update):
            raise ArgumentError(
                f'JointSampler: update must be "jacobi" or "gauss-seidel"; got {update!r}.'
            )
        self.samplers = dict(samplers)
        self.path = path
        self.steps = steps
        self.update = update
        self.guidance = dict(guidance or {})

    def check_supported(
        self,
        fields: Fields,
        predicts: Mapping[str, Predicts],
        given: Mapping[str, Hold] | None = None,
    ) -> LegPath:
        """Return the path on which the fields of `given` are held.

        Raises ArgumentError if a sampler is missing, does not support its field, or cannot follow
        the path.
        """
        self.path.check_fields(fields)
        unknown = set(self.samplers) - set(fields)
        if unknown:
            raise ArgumentError(
                f"JointSampler: samplers name {', '.join(sorted(unknown))}, but the fields are "
                f"{', '.join(fields)}."
            )
        legs = {**self.path.legs, **(given or {})}
        for name, leg in legs.items():
            if isinstance(leg, HeldAt):
                raise ArgumentError(
                    f'JointSampler: the path holds "{name}" with noise of deviation '
                    f"{leg.deviation:g}, which is for training and evaluation. In sampling, hold "
                    'it "clean", "prior" or "absent".'
                )
        moving = [name for name, leg in legs.items() if isinstance(leg, Leg)]
        if not moving:
            raise ArgumentError("JointSampler: all fields are given, so nothing is sampled.")
        for name in moving:
            if name not in self.samplers:
                raise ArgumentError(
                    f'JointSampler: the field "{name}" moves on {self.path} but has no sampler.'
                )
            process = fields[name].process
            require_states(self.samplers[name], process, predicts[name])
            self.samplers[name].check_supported(process, predicts[name])
        check_guidance(self.guidance, predicts, "JointSampler")
        path = given_path(self.path, given or {})
        for group in path.groups:
            if len(group) > 1:
                for name in group:
                    _require_grid(name, self.samplers[name], set(group) - {name})
        return path


def generate_fields(
    sampler: JointSampler,
    fields: Fields,
    network: JointNetwork,
    *,
    index: Tensor,
    seed: int,
    given: Given | None = None,
    on_step: OnJointStep | None = None,
) -> JointSamples:
    """Draw one sample of all fields per entry of `index` [B].

    A sample depends on its number in `index` and on the seed, not on the batch. With a single field
    the samples equal those of `generate`, bit for bit.

    Args:
        sampler: path and samplers of the fields.
        fields: fields by name.
        network: joint network. Its attribute `predicts` says what it predicts for each field; the
            default is distributions of tokens and means of vectors.
        index: [B] long, numbers of the samples.
        seed: seed of the random generator.
        given: states to keep, by field: (values, mask). A field that is given without a mask is
            clean on the whole path, and the result holds the same tensor. With a mask [B,n] bool,
            marked positions keep their values, and the others are sampled.
        on_step: on_step(k, canvases) is called after every step k = 1, 2, ...

    Raises ArgumentError if the sampler does not support the fields, or if given states do not fit.
    """
    given = given or {}
    _check_given(fields, sampler.path, given)
    whole: dict[str, Hold] = {name: "clean" for name, (_, mask) in given.items() if mask is None}
    predicts = _predictions(fields, network)
    path = sampler.check_supported(fields, predicts, whole)
    counter = JointCounter(network, predicts, len(index))
    rng_at = _make_rng_at(fields, index, seed)
    canvases = initial_canvases(fields, index=index, seed=seed, given=given)
    state = _JointState(fields, path, counter, sampler.guidance, rng_at, canvases)
    for step, _ in enumerate(_run_path(state, sampler), start=1):
        if on_step:
            on_step(step, dict(state.canvases))
    states = {}
    for name, leg in path.legs.items():
        if name in whole:
            states[name] = given[name][0]
        elif isinstance(leg, Leg):
            states[name] = state.canvases[name].zt
    runs = counter.count.runs
    assert runs is not None  # the counter knows the number of samples
    return JointSamples(states=states, nfe=counter.count.calls, runs=runs)


def _make_rng_at(fields: Fields, index: Tensor, seed: int) -> Callable[[int, str], CounterRng]:
    """Return the function (step, name) -> generator of a step and a field."""

    def rng_at(step: int, name: str) -> CounterRng:
        rng = CounterRng(seed, step, index, fields[name].positions, "sample")
        return rng_of_field(rng, fields, name)

    return rng_at


def initial_canvases(
    fields: Fields, *, index: Tensor, seed: int, given: Given | None = None
) -> JointCanvas:
    """Return the canvases of all fields at tau = 1, from which `generate_fields` starts.

    The arguments are those of `generate_fields`.
    """
    given = given or {}
    rng_at = _make_rng_at(fields, index, seed)
    canvases = {}
    for name, field in fields.items():
        values, mask = given.get(name, (None, None))
        if values is not None and mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        try:
            canvases[name] = initial_canvas(field.process, rng_at(0, name), values, mask)
        except ArgumentError as error:
            raise ArgumentError(f'generate_fields: given["{name}"] does not fit: {error}') from None
    return canvases


class _JointState:
    """Canvases of all fields during sampling, and the joint network that reads them.

    Args:
        fields: fields by name.
        path: path on which given fields are held.
        counter: counter of the network.
        guidance: guidance by the name of the guided field.
        rng_at: generator of a step and a field.
        canvases: canvases at tau = 1.
    """

    def __init__(
        self,
        fields: Fields,
        path: LegPath,
        counter: JointCounter,
        guidance: Mapping[str, Guidance],
        rng_at: Callable[[int, str], CounterRng],
        canvases: JointCanvas,
    ) -> None:
        self.fields = fields
        self.path = path
        self.counter = counter
        self.rng_at = rng_at
        self.canvases = dict(canvases)
        self.network: JointNetwork = counter
        if guidance:
            # These are also the first states of the fields. A field that is still at its prior is
            # therefore the same with and without guidance, and does not change the prediction.
            noise = {
                name: field.process.prior.draw_positions(rng_at(0, name), "start")
                for name, field in fields.items()
            }
            self.network = GuidedJointNetwork(counter, guidance, noise)

    def network_input(self) -> JointNoisy:
        """Return the present input of the joint network."""
        state = {}
        for name, canvas in self.canvases.items():
            noisy = canvas.network_input()
            if self.path.legs[name] == "absent":
                noisy = noisy._replace(absent=torch.ones_like(noisy.clean[:, 0]))
            state[name] = noisy
        return state

    def hold(
        self, name: str, state: JointNoisy, network: JointNetwork | None = None
    ) -> HeldNetwork:
        """Return the network of one field, with the other fields held at their states in `state`.

        `network` replaces the joint network; it must count with the same counter.
        """
        return HeldNetwork(network or self.network, self.counter, state, name)


def _run_path(state: _JointState, sampler: JointSampler) -> Iterator[None]:
    """Move all fields along the path from tau = 1 to tau = 0, and yield after each step."""
    for group in reversed(state.path.groups):
        if len(group) == 1:
            yield from _run_alone(state, sampler.samplers[group[0]], group[0])
        else:
            yield from _run_together(state, sampler, group)


def _run_alone(state: _JointState, sampler: Sampler, name: str) -> Iterator[None]:
    """Run the sampler of a field from its prior to clean states, with other fields held."""
    field = state.fields[name]
    held = state.hold(name, state.network_input())
    follower = _follow_rule(sampler, field)

    def rng_at(step: int) -> CounterRng:
        return state.rng_at(step, name)

    for canvas in follower.run(field.process, held, state.canvases[name], rng_at):
        state.canvases[name] = canvas
        yield
    state.canvases[name] = _finished(state.canvases[name])


def _run_together(
    state: _JointState, sampler: JointSampler, group: Sequence[str]
) -> Iterator[None]:
    """Move fields whose legs overlap along one grid of tau."""
    legs = {}
    for name in sampler.samplers:
        leg = state.path.legs[name]
        if name in group and isinstance(leg, Leg):
            legs[name] = leg
    taus = _make_grid(list(legs.values()), sampler.steps)
    for k, (tau, next_tau) in enumerate(pairwise(taus)):
        moving = [name for name, leg in legs.items() if leg.start < tau <= leg.stop]
        progress = torch.full_like(state.canvases[moving[0]].t[:, 0], next_tau)
        later = state.path.at(state.fields, progress)
        start = state.network_input()
        network = None
        if sampler.update == "jacobi":
            network = SharedState(state.network, start)
        for name in moving:
            if sampler.update == "gauss-seidel":
                start = state.network_input()
            state.canvases[name] = _move_field(
                sampler.samplers[name],
                state.fields[name],
                state.hold(name, start, network),
                state.canvases[name],
                later[name].t,
                is_last=next_tau <= legs[name].start,
                rng=state.rng_at(k, name),
            )
        yield


def _move_field(
    sampler: Sampler,
    field: Field,
    network: Network,
    canvas: Canvas,
    s: Tensor,
    is_last: bool,
    rng: CounterRng,
) -> Canvas:
    """Return the canvas of one field at times s [B,n], or decoded if the step is its last."""
    if isinstance(sampler, ShapedSampler):
        network = shape_network(network, sampler.shapers)
        sampler = sampler.inner
    assert isinstance(sampler, GridSampler)  # `check_supported` refuses others
    nothing = torch.zeros_like(canvas.free)
    moved = move_positions(
        sampler,
        field.process,
        network,
        canvas,
        s,
        continues=nothing if is_last else canvas.free,
        finishes=canvas.free if is_last else nothing,
        rng=rng,
    )
    if is_last:
        return _finished(moved)
    return replace(moved, t=torch.where(canvas.free, s, canvas.t))


def _finished(canvas: Canvas) -> Canvas:
    """Return the canvas of a decoded field: every position is clean."""
    everywhere = torch.ones_like(canvas.clean)
    return replace(
        canvas,
        t=torch.zeros_like(canvas.t),
        clean=everywhere,
        free=~everywhere,
        block=None,
    )


def _follow_rule(sampler: Sampler, field: Field) -> Sampler:
    """Return the sampler that follows the windows of the field's time rule, if it has windows."""
    if field.rule.has_one_time:
        return sampler
    if isinstance(sampler, GridSampler):
        return HyperscheduleSampler(sampler, field.rule)
    if isinstance(sampler, ShapedSampler) and isinstance(sampler.inner, GridSampler):
        return ShapedSampler(HyperscheduleSampler(sampler.inner, field.rule), sampler.shapers)
    return sampler


def _make_grid(legs: Sequence[Leg], steps: int) -> list[float]:
    """Return falling values of tau that contain all starts and stops of legs.

    Between two of them the steps are equal, about 1/steps each.
    """
    points = sorted({end for leg in legs for end in leg}, reverse=True)
    taus = points[:1]
    for high, low in pairwise(points):
        # Rounding of a length such as 0.3 * 10 must not add a step.
        count = max(1, round((high - low) * steps))
        taus += [high + (low - high) * k / count for k in range(1, count)]
        taus.append(low)
    return taus


# ---------------------------------------------------------------------- checks


def _require_grid(name: str, sampler: Sampler, others: set[str]) -> None:
    """Raise ArgumentError if a sampler cannot move its field while other fields move."""
    inner = sampler.inner if isinstance(sampler, ShapedSampler) else sampler
    together = ", ".join(sorted(others))
    if not isinstance(inner, GridSampler):
        raise ArgumentError(
            f"JointSampler: {type(inner).__name__} chooses its own times, so it cannot move "
            f'"{name}" together with {together}, whose times the path prescribes. Use a sampler '
            'with steps ("ancestral", for vectors "ddim"), or a path on which the fields move one '
            'after the other (kind = "first").'
        )
    if isinstance(inner.grid, LoopGrid):
        raise ArgumentError(
            f'JointSampler: the grid of the sampler of "{name}" pauses at a constant time, but the '
            f'path moves "{name}" together with {together} without a pause. Use another sampler, '
            'or a path on which the fields move one after the other (kind = "first").'
        )


def _predictions(fields: Fields, network: JointNetwork) -> Mapping[str, Predicts]:
    """Return what the network predicts for each field."""
    known: Mapping[str, Predicts] = getattr(network, "predicts", {})
    return {
        name: known.get(name, natural_prediction(field.process)) for name, field in fields.items()
    }


def _check_given(fields: Fields, path: LegPath, given: Given) -> None:
    """Raise ArgumentError if given fields do not exist or do not fit the path."""
    path.check_fields(fields)
    unknown = set(given) - set(fields)
    if unknown:
        raise ArgumentError(
            f"generate_fields: given names {', '.join(sorted(unknown))}, but the fields are "
            f"{', '.join(fields)}."
        )
    for name, leg in path.legs.items():
        if leg == "clean" and name not in given:
            raise ArgumentError(
                f'generate_fields: {path} holds "{name}" clean, so its states must be given.'
            )
        if isinstance(leg, str) and name in given and given[name][1] is not None:
            raise ArgumentError(
                f'generate_fields: {path} holds "{name}", so its positions cannot be sampled; give '
                "all positions, without a mask."
            )
