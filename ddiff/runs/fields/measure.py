"""Measured cost of a recipe of several fields: `ddiff run --dry-run --measure N`.

Parameters and FLOPs are counted. Memory and speed are measured in the first N training steps. The
steps run in one process, with the samples of one rank, in a temporary directory. If the data are
not on this machine, random values replace them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddiff.core.normalizer import IdentityNormalizer, Normalizer
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.fields_batch import FieldBatch, FieldsBatch, token_field, vector_field
from ddiff.errors import DataError
from ddiff.nn.denoiser import count_parameters
from ddiff.nn.joint_denoiser import JointBackbone, JointContext, JointMask, StreamInput
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.backends import build_backend
from ddiff.runs.cost import (
    TRAINING,
    Footprint,
    count_flops,
    gathered_bytes,
    num_bytes,
)
from ddiff.runs.cost_table import (
    Row,
    format_bytes,
    format_count,
    format_duration,
    make_memory_table,
    plural,
    print_cost,
)
from ddiff.runs.fields.build import FieldsModel, assemble_fields
from ddiff.runs.fields.data import preview_fields
from ddiff.runs.fields.run import FieldsRun
from ddiff.runs.fields.values import FieldShape
from ddiff.runs.measure import (
    ROUNDING,
    Pace,
    check_step_memory,
    make_single_process,
    measure_footprint,
    measure_pace,
    saved_bytes,
    train_steps,
)
from ddiff.runs.session import TrainingSession
from ddiff.training.device import get_device

COUNTED = 2  # samples on which FLOPs are counted


@dataclass(frozen=True)
class FieldsMeasurement:
    """Measured cost of a recipe.

    Attributes:
        recipe: the recipe.
        device: device of the measurement.
        stand_in: reason why random values replaced the data; an empty string if the data were used.
        parameters: number of parameters of the backbone, and of the head of every field.
        flops: FLOPs of a training step per sample.
        footprint: bytes of one process that stores the whole model.
        gathered: bytes of weights that FSDP gathers at once.
        checkpoint: bytes of a checkpoint.
        pace: speed of one rank, in tokens and numbers per second.
        first_loss: loss of the first training step.
        expected_loss: the same loss with hidden states of 0, which is known without the backbone;
            None: the output matrix of a head does not start at 0.
    """

    recipe: FieldsRecipe
    device: torch.device
    stand_in: str
    parameters: Mapping[str, int]
    flops: float
    footprint: Footprint
    gathered: int
    checkpoint: float
    pace: Pace
    first_loss: float
    expected_loss: float | None

    @property
    def mfu(self) -> float:
        """Return the model FLOPs utilization: training FLOPs per second over peak FLOPs."""
        samples = self.recipe.train.batch // self.recipe.backend_keys.processes
        return self.flops * samples / self.pace.step_seconds / self.pace.peak

    @property
    def is_off(self) -> bool:
        """True if the loss of the first step differs from the expected loss."""
        if self.expected_loss is None:
            return False
        allowed = ROUNDING * max(1.0, abs(self.expected_loss))
        return not abs(self.first_loss - self.expected_loss) <= allowed  # also for NaN


def measure(recipe: FieldsRecipe, count: int) -> FieldsMeasurement:
    """Train `count` steps of the recipe in one process and return the measured cost."""
    with tempfile.TemporaryDirectory(prefix="ddiff-measure-") as directory:
        single = make_single_process(recipe, directory)
        assert isinstance(single, FieldsRecipe)
        _check_memory(single)
        session, stand_in = _open_session(single)
        with session:
            if not stand_in:
                session.initialize_weights()
            return _measure_session(recipe, session, count, stand_in)


def _check_memory(recipe: FieldsRecipe) -> None:
    """Raise ArgumentError if free memory cannot hold the parameters or the activations."""
    shapes = preview_fields(recipe)
    if shapes is None:
        return
    denoiser = assemble_fields(recipe, shapes, torch.device("meta")).denoiser
    streams = {name: _make_input(shape) for name, shape in shapes.items()}
    inputs = sum(shape.positions for shape in shapes.values())
    forward = partial(denoiser.backbone, streams, JointMask(None), JointContext())
    kept = saved_bytes(denoiser, forward, inputs)
    check_step_memory(recipe, denoiser, kept, "samples")


def _make_input(shape: FieldShape) -> StreamInput:
    """Return the inputs of the stream of a field for one sample, on the meta device."""
    size = (1, shape.positions)
    if shape.width is None:
        states = torch.zeros(size, dtype=torch.long, device="meta")
    else:
        states = torch.zeros(*size, shape.width, device="meta")
    t = torch.zeros(size, device="meta").double()
    return StreamInput(states, t, torch.arange(shape.positions, device="meta"))


def _measure_session(
    recipe: FieldsRecipe, session: TrainingSession[FieldsRun], count: int, stand_in: str
) -> FieldsMeasurement:
    run = session.run
    expected = _expected_loss(session)
    flops = _count_flops(session)
    session.distribute()
    trainer = session.trainer()
    steps, rise = train_steps(trainer, count)
    footprint = measure_footprint(run.denoiser, trainer, rise)
    weights = num_bytes(dict(run.denoiser.state_dict()))
    return FieldsMeasurement(
        recipe=recipe,
        device=run.device,
        stand_in=stand_in,
        parameters=count_by_part(run.denoiser.backbone, run.denoiser.heads),
        flops=flops,
        footprint=footprint,
        gathered=gathered_bytes(run.denoiser),
        checkpoint=weights + footprint.optimizer + footprint.average,
        pace=measure_pace(steps, run.device),
        first_loss=steps[0].loss,
        expected_loss=expected,
    )


def count_by_part(backbone: nn.Module, heads: nn.ModuleDict) -> dict[str, int]:
    """Return the number of parameters of the backbone and of every head."""
    counts = {"backbone": count_parameters(backbone)}
    for name, head in heads.items():
        counts[f"head of {name}"] = count_parameters(head)
    return counts


def _count_flops(session: TrainingSession[FieldsRun]) -> float:
    """Return the FLOPs of a training step per sample: three times those of the forward pass."""
    run = session.run
    batch = run.data.batch_at(0, 0)
    size = min(COUNTED, len(batch.index))
    fields = {
        name: FieldBatch(*(part[:size] for part in values)) for name, values in batch.fields.items()
    }
    few = FieldsBatch(fields, batch.index[:size])
    with count_flops() as counter:
        _loss(run.objective, [few], session, slots=size)
    return TRAINING * counter.get_total_flops() / size


# ---------------------------------------------------------------------- the first loss


class ZeroBackbone(JointBackbone):
    """Backbone that returns zeros [B,m,1] as hidden states of every field."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.widths = dict.fromkeys(names, 1)

    def forward(
        self, streams: Mapping[str, StreamInput], mask: JointMask, context: JointContext
    ) -> dict[str, Tensor]:
        found = {}
        for name, stream in streams.items():
            found[name] = torch.zeros(*stream.t.shape, 1, device=stream.t.device)
        return found


def _expected_loss(session: TrainingSession[FieldsRun]) -> float | None:
    """Return the loss of the first step with hidden states of 0.

    The output matrices of heads start at 0, so that the first predictions depend only on the
    biases. Returns None if an output matrix is not 0.
    """
    run = session.run
    for head in run.denoiser.heads.values():
        if any(bool(weight.any()) for weight in head.parameters() if weight.dim() > 1):
            return None
    model = _without_backbone(run)
    keys = session.recipe.train
    batches = [run.data.batch_at(0, micro) for micro in range(keys.accumulate)]
    return _loss(model.objective, batches, session, keys.batch)


def _without_backbone(run: FieldsRun) -> FieldsModel:
    """Build a model like that of a run, with a backbone that returns zeros."""
    zeros = ZeroBackbone(list(run.model.fields))
    shapes = {name: values.shape for name, values in run.data.fields.items()}
    model = assemble_fields(run.recipe, shapes, run.device, zeros)
    for name, head in model.denoiser.heads.items():
        theirs = run.denoiser.heads[name].state_dict()
        own = head.state_dict()
        # the output matrix has another width, and is 0 in both
        fitting = {key: value for key, value in theirs.items() if value.shape == own[key].shape}
        head.load_state_dict(fitting, strict=False)
    return model


@torch.no_grad()
def _loss(
    objective: Any, batches: list[FieldsBatch], session: TrainingSession[FieldsRun], slots: int
) -> float:
    """Return the loss of the first training step on a global batch, given as micro-batches."""
    device = get_device(objective.module)
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counted = torch.as_tensor(count, dtype=torch.float64, device=device)
            counts[name] = counts[name] + counted if name in counts else counted
    total = 0.0
    for batch in batches:
        total += float(objective(batch, session.rng_at(0, batch), counts, slots).loss)
    return total


# ---------------------------------------------------------------------- random values


class RandomValues:
    """Values of a field that stand in for data: uniform tokens, or normal numbers."""

    def __init__(self, name: str, shape: FieldShape) -> None:
        self.name = name
        self.shape = shape
        self.vocabulary: Vocabulary | None = shape.vocabulary
        self.normalizer: Normalizer | None = None
        if shape.width is not None:
            self.normalizer = IdentityNormalizer(shape.width)

    def draw(self, rng: np.random.Generator, count: int) -> FieldBatch:
        """Draw the values of `count` samples."""
        if self.shape.vocabulary is not None:
            num_tokens = self.shape.vocabulary.num_tokens
            ids = rng.integers(num_tokens, size=(count, self.shape.positions))
            return token_field(torch.from_numpy(ids))
        assert self.shape.width is not None
        vectors = rng.standard_normal((count, self.shape.positions, self.shape.width))
        return vector_field(torch.from_numpy(vectors))


class RandomFields:
    """Random samples in place of the data of a recipe."""

    def __init__(self, recipe: FieldsRecipe, shapes: Mapping[str, FieldShape]) -> None:
        self.recipe = recipe
        self.fields = {name: RandomValues(name, shape) for name, shape in shapes.items()}

    def batch_at(self, step: int, micro: int, rank: int = 0, world_size: int = 1) -> FieldsBatch:
        """Return random samples."""
        keys = self.recipe.train
        size = keys.batch // (keys.accumulate * world_size)
        rng = np.random.default_rng((self.recipe.seed, step, micro))
        fields = {name: values.draw(rng, size) for name, values in self.fields.items()}
        return FieldsBatch(fields, torch.arange(micro * size, (micro + 1) * size))

    def fingerprints(self) -> dict[str, str]:
        """Return no fingerprints: nothing of a measurement is kept."""
        return {}


def _open_session(recipe: FieldsRecipe) -> tuple[TrainingSession[FieldsRun], str]:
    """Open a training session on the data of the recipe, or on random values.

    Returns the session, and the reason why random values replace the data. The reason is an empty
    string if the session uses the data.
    """
    try:
        return TrainingSession.open(recipe), ""
    except (DataError, OSError) as error:
        shapes = preview_fields(recipe)
        if shapes is None:
            raise
        reason = str(error).partition("\n")[0]
    backend = build_backend(recipe)
    data: Any = RandomFields(recipe, shapes)
    run = FieldsRun(recipe, assemble_fields(recipe, shapes, backend.device), data)
    return TrainingSession(run, backend), reason


# ---------------------------------------------------------------------- table


def print_measurement(measured: FieldsMeasurement) -> None:
    """Print all figures of a measurement."""
    recipe = measured.recipe
    ranks = recipe.backend_keys.processes
    samples = plural(recipe.train.batch // ranks, "sample", "samples")
    heading = [
        f"{recipe.name}, one of {plural(ranks, 'process', 'processes')}, on {measured.device}, "
        f"{samples} a step"
    ]
    if measured.stand_in:
        heading.append(f"Random values replace the data of the recipe: {measured.stand_in}")
    warning = None
    if measured.is_off:
        warning = (
            f"WARNING: the first loss is {measured.first_loss:.4f}, but the initial predictions "
            f"of the heads have the loss {measured.expected_loss:.4f} on the same samples, times "
            "and noise, for any hidden states. Check the loss and its denominators."
        )
    memory = make_memory_table(measured.footprint, measured.gathered, ranks)
    print_cost(heading, _make_rows(measured), memory, warning)


def _make_rows(measured: FieldsMeasurement) -> list[Row]:
    keys = measured.recipe.train
    pace = measured.pace
    parts = [f"{name} {count:,}" for name, count in measured.parameters.items()]
    expected = "unknown: the output matrix of a head does not start at 0"
    if measured.expected_loss is not None:
        expected = f"of step 1; the initial predictions of the heads: {measured.expected_loss:.4f}"
    return [
        ("parameters", f"{sum(measured.parameters.values()):,}", ", ".join(parts)),
        (
            "FLOPs/sample",
            format_count(measured.flops),
            f"{TRAINING} x those of a forward pass, with attention and heads",
        ),
        ("items/s", f"{pace.tokens_per_second:,.0f}", f"{pace.step_seconds:.3f} s a step"),
        ("MFU", f"{measured.mfu:.1%}", f"of {format_count(pace.peak)}FLOP/s: {pace.peak_from}"),
        (
            "ETA",
            format_duration(pace.step_seconds * keys.steps),
            f"for {keys.steps:,} steps of {keys.batch:,} samples",
        ),
        (
            "checkpoint",
            format_bytes(measured.checkpoint),
            f"weights and optimizer; {keys.keep} are kept",
        ),
        ("first loss", f"{measured.first_loss:.4f}", expected),
    ]
