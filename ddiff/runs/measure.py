"""Measured cost of a recipe: `ddiff run --dry-run --measure N`.

Parameters, logits and FLOPs are counted. Memory and speed are measured in the first N training
steps. The steps run in one process, with the rows of one rank, in a temporary directory. Nothing
is downloaded. If the text is not on this machine, random tokens replace the text.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from ddiff.core.rng import CounterRng
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.batch import Batch
from ddiff.data.condition_forms import Vector
from ddiff.data.conditions import Conditions
from ddiff.data.packing import PackedRows, batch_rows, pack_ids
from ddiff.data.tokenizer import AlphabetTokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import UNPADDED, Backbone, Context, Denoiser, count_parameters
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.recipe.fields_recipe import FieldsRecipe, require_text_recipe
from ddiff.recipe.model import BaseRecipe, Recipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.backends import build_backend
from ddiff.runs.build import assemble
from ddiff.runs.cost import (
    TRAINING,
    Footprint,
    Parameters,
    count_flops,
    count_logits,
    free_bytes,
    gathered_bytes,
    num_bytes,
    peak_flops,
)
from ddiff.runs.data import RunData, RunText
from ddiff.runs.peak_memory import MemoryRise
from ddiff.runs.run import Run
from ddiff.runs.session import TrainingSession
from ddiff.training.metrics import StepRecord
from ddiff.training.protocols import Objective
from ddiff.training.trainer import Trainer

STAND_IN_ROWS = 4096
GROUPS = 16  # groups of rows over which the expected first loss is averaged
GROUP_LOGITS = 2**25  # logits of a group: a second on a CPU
ROUNDING = 1e-3  # allowed relative error of the first loss: float32 sums in another order
COPIES = 4  # of all parameters with AdamW: weights, gradients and two moments


class Cost(NamedTuple):
    """Counted cost of a recipe.

    `backbone_flops` and `head_flops` are per token of one forward pass. Bytes are those of one
    process that stores the whole model.
    """

    parameters: Parameters
    backbone_flops: float
    head_flops: float
    logits: float  # per token
    footprint: Footprint
    gathered: int  # bytes of weights that FSDP gathers at once
    checkpoint: float

    @property
    def flops(self) -> float:
        """Return the FLOPs of a training step (forward and backward pass) per token."""
        return TRAINING * (self.backbone_flops + self.head_flops)


class Pace(NamedTuple):
    """Measured speed of one rank on one device."""

    tokens_per_second: float
    step_seconds: float
    peak: float  # peak FLOPs per second of the device
    peak_from: str


class InitialLoss(NamedTuple):
    """Expected loss before the first training step, in nats per token.

    Before training, the distribution that the head predicts depends only on the biases of the head.
    The expected loss can therefore be computed without the backbone.
    """

    mean: float  # over rows, times and noise
    error: float  # standard error of that mean
    spread: float  # standard deviation of one step's loss
    of_step_1: float  # on the rows, times and noise of the first step


@dataclass(frozen=True)
class Measurement:
    """Measured cost of a recipe.

    `stand_in`: reason why random tokens replaced the text; an empty string if the text was used.
    `items`: name of the items that count as tokens, such as "tokens of answers".
    """

    recipe: Recipe
    device: torch.device
    stand_in: str
    num_tokens: int
    cost: Cost
    pace: Pace
    first_loss: float
    initial: InitialLoss | None  # None: the weights of the head do not start at zero
    unigram: float  # nats per token
    items: str

    @property
    def mfu(self) -> float:
        """Return the model FLOPs utilization: training FLOPs per second over peak FLOPs."""
        return self.cost.flops * self.pace.tokens_per_second / self.pace.peak

    @property
    def is_off(self) -> bool:
        """True if the loss of the first training step differs from the expected initial loss.

        Both losses are computed on the same rows, noise times and noise.
        """
        if self.initial is None:
            return False
        allowed = ROUNDING * max(1.0, abs(self.initial.of_step_1))
        return not abs(self.first_loss - self.initial.of_step_1) <= allowed  # also for NaN


def measure(recipe: Recipe, count: int) -> Measurement:
    """Train `count` steps of the recipe in one process and return the measured cost."""
    with tempfile.TemporaryDirectory(prefix="ddiff-measure-") as directory:
        single = require_text_recipe(make_single_process(recipe, directory), "measure")
        _check_memory(single)
        session, stand_in = _open_session(single)
        with session:
            session.initialize_weights()
            return _measure_session(recipe, session, count, stand_in)


def make_single_process(recipe: BaseRecipe, directory: str) -> Recipe | FieldsRecipe:
    """Return a recipe that trains on one rank, with that rank's share of the batch of `recipe`.

    The run directory of the returned recipe is `directory`. The recipe has no tracker.
    """
    settings = [
        f"run_dir={json.dumps(directory)}",
        f"train.batch={recipe.train.batch // recipe.backend_keys.processes}",
        "tracker=none",
        "backend.kind=single",
        "backend.processes=1",
    ]
    return parse_recipe(recipe.to_toml(), recipe.name, settings)


def _measure_session(
    recipe: Recipe, session: TrainingSession[Run], count: int, stand_in: str
) -> Measurement:
    run = session.run
    initial = _initial_loss(session)
    backbone_flops = _backbone_flops(session)
    session.distribute()
    trainer = session.trainer()
    with count_logits(run.denoiser.head) as logits:
        steps, rise = train_steps(trainer, count)
    tokens = sum(step.tokens for step in steps)
    footprint = measure_footprint(run.denoiser, trainer, rise)
    weights = num_bytes(dict(run.denoiser.state_dict()))
    cost = Cost(
        parameters=Parameters.of(run.denoiser),
        backbone_flops=backbone_flops,
        head_flops=2.0 * run.denoiser.head.width * logits.total / tokens,
        logits=logits.total / tokens,
        footprint=footprint,
        gathered=gathered_bytes(run.denoiser),
        checkpoint=weights + footprint.optimizer + footprint.average,
    )
    return Measurement(
        recipe=recipe,
        device=run.device,
        stand_in=stand_in,
        num_tokens=run.vocabulary.num_tokens,
        cost=cost,
        pace=measure_pace(steps, run.device),
        first_loss=steps[0].loss,
        initial=initial,
        unigram=_unigram_entropy(run),
        items="tokens" if stand_in else run.data.counted_items,
    )


def measure_footprint(denoiser: nn.Module, trainer: Trainer, rise: float) -> Footprint:
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    average = trainer.ema
    return Footprint(
        parameters=num_bytes(list(denoiser.parameters())),
        gradients=num_bytes(trained),
        optimizer=num_bytes(trainer.optimizer.state_dict()),
        average=num_bytes(average.weights) if average else 0,
        activations=rise,
    )


# ---------------------------------------------------------------------- memory


def _check_memory(recipe: Recipe) -> None:
    """Raise ArgumentError if free memory cannot hold the parameters or the activations."""
    vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
    if vocabulary is None:
        return
    denoiser = assemble(recipe, vocabulary, torch.device("meta")).denoiser
    ids = torch.zeros(1, recipe.length, dtype=torch.long, device="meta")
    t = torch.zeros(1, recipe.length, device="meta").double()
    kept = saved_bytes(denoiser, partial(denoiser.backbone, ids, t, UNPADDED), recipe.length)
    check_step_memory(recipe, denoiser, kept, "rows")


def check_step_memory(
    recipe: BaseRecipe, denoiser: Denoiser | JointDenoiser, kept_per_row: float, rows_name: str
) -> None:
    """Raise ArgumentError if free memory cannot hold the parameters or the activations.

    Args:
        recipe: recipe that trains in one process.
        denoiser: the denoiser, on the meta device.
        kept_per_row: bytes that the backbone saves for the backward pass of one row.
        rows_name: name of the rows in messages.
    """
    backend = build_backend(recipe)
    needed = COPIES * num_bytes(list(denoiser.parameters()))
    free = free_bytes(backend.device)
    backend.close()
    rows = recipe.train.batch // recipe.train.accumulate
    kept = 0.0
    if not recipe.backend_keys.activation_checkpointing:
        kept = rows * kept_per_row
    if denoiser.precision is not None:  # matrix products are saved in half the bytes
        kept /= 2
    if needed <= free < needed + kept:
        batch = max(1, int(rows * (free - needed) / (2 * kept)))
        raise ArgumentError(
            f"--measure: the backward pass of {recipe.name} saves about {kept / 2**30:.1f} GiB for "
            f"{rows} {rows_name}, next to {needed / 2**30:.1f} GiB of parameters, gradients and "
            f"moments; {backend.device} has {free / 2**30:.1f} GiB free. Use fewer {rows_name} at "
            "a time: --set train.accumulate=N, more processes, or "
            f"--set backend.processes=1 --set train.batch={batch}."
        )
    if needed > free:
        raise ArgumentError(
            f"--measure: {recipe.name} has {count_parameters(denoiser):,} parameters, which "
            f"with gradients and the two moments of AdamW take {needed / 2**30:.1f} GiB; "
            f"{backend.device} has {free / 2**30:.1f} GiB free. Use a device with more memory, or "
            "measure a smaller network: --set denoiser.layers=2."
        )


def saved_bytes(denoiser: nn.Module, forward: Callable[[], object], length: int) -> int:
    """Return the bytes that a backbone saves for the backward pass of one row.

    The attention scores, a tensor [L,L] per head for L inputs, are not counted, since fused
    attention does not save the scores. Returns 0 if the backbone cannot run on the meta device.

    Args:
        denoiser: the denoiser, whose weights are not counted.
        forward: function that runs the backbone on one row, on the meta device.
        length: smallest number of inputs that attend to each other.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        # A backbone may add inputs to the L tokens, for example conditions.
        is_scores = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] >= length
        if not is_scores:
            # keep a reference, so that no later storage gets the same address
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            forward()
    except (
        NotImplementedError,
        RuntimeError,
    ):  # the backbone needs values, which meta tensors lack
        return 0
    sizes = [
        tensor.untyped_storage().nbytes()
        for storage, tensor in saved.items()
        if storage not in weights
    ]
    return sum(sizes)


# ---------------------------------------------------------------------- text


def _open_session(recipe: Recipe) -> tuple[TrainingSession[Run], str]:
    """Open a training session on the text of the recipe, or on random tokens.

    Returns the session, and the reason why random tokens replace the text. The reason is an empty
    string if the session uses the text.
    """
    try:
        return TrainingSession.open(recipe), ""
    except (DataError, OSError) as error:
        num_tokens = recipe.tokenizer.preview()
        vocabulary = recipe.vocabulary.preview(num_tokens=num_tokens)
        if num_tokens is None or vocabulary is None:
            raise
        reason = str(error).partition("\n")[0]
    # weights of another run need its tokenizer, which random tokens do not have
    without_init = replace(recipe, train=recipe.train.model_copy(update={"init": None}))
    return _open_stand_in(without_init, vocabulary), reason


def _open_stand_in(recipe: Recipe, vocabulary: Vocabulary) -> TrainingSession[Run]:
    backend = build_backend(recipe)
    model = assemble(recipe, vocabulary, backend.device)
    text = RandomText(recipe, vocabulary.num_tokens)
    denoiser = model.denoiser
    data = RandomData(text, denoiser.condition_dropout, denoiser.condition_forms)
    return TrainingSession(Run(recipe, model, data), backend)


class RandomData(RunData):
    """Rows of random tokens. Every row is a document with random values of the conditions."""

    @cached_property
    def train_conditions(self) -> Conditions:
        random = np.random.default_rng(self.recipe.seed)
        values = {}
        for name, form in self._forms.items():
            if isinstance(form, Vector):
                vectors = random.standard_normal((STAND_IN_ROWS, form.width or 1))
                values[name] = torch.from_numpy(vectors.astype(np.float32))
            else:
                labels = random.integers(form.classes or 1, size=STAND_IN_ROWS)
                values[name] = torch.from_numpy(labels)
        return Conditions(values)

    @cached_property
    def validation_conditions(self) -> Conditions:
        return self.train_conditions


class RandomText(RunText):
    """Rows of random tokens, whose frequencies follow Zipf's law."""

    def __init__(self, recipe: Recipe, num_tokens: int) -> None:
        super().__init__(recipe, _alphabet(num_tokens))
        self.num_tokens = num_tokens

    @cached_property
    def train_rows(self) -> PackedRows:
        """Draw rows of independent tokens.

        A random permutation ranks the tokens, and the token of rank r has weight 1 / (r + 2.7).
        """
        random = np.random.default_rng(self.recipe.seed)
        share = 1.0 / (np.arange(self.num_tokens) + 2.7)
        order = random.permutation(self.num_tokens)
        shape = (STAND_IN_ROWS, self.recipe.length)
        ranks = random.choice(self.num_tokens, shape, p=share / share.sum())
        return pack_ids(order[ranks], self.num_tokens)

    @cached_property
    def validation_rows(self) -> PackedRows:
        return self.train_rows


def _alphabet(num_tokens: int) -> AlphabetTokenizer:
    """Return a placeholder tokenizer with `num_tokens` tokens."""
    surrogates = range(0xD800, 0xE000)
    codes = (code for code in range(num_tokens + len(surrogates)) if code not in surrogates)
    return AlphabetTokenizer([chr(code) for code, _ in zip(codes, range(num_tokens))])


def _unigram_entropy(run: Run) -> float:
    """Return the unigram entropy of the training text in nats per token.

    The unigram distribution is proportional to the token counts plus one.
    """
    counts = run.data.train_rows.token_counts()
    log_share = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    return -float((counts * log_share).sum() / counts.sum())


# ---------------------------------------------------------------------- steps


@final
class MemoryWatch:
    """Measurement of the peak memory of training steps. `Trainer.fit` calls `on_step` after a step.

    The memory in use after step `window` is the baseline. After step `last`, `bytes` is the peak
    memory since step `window` minus the baseline.
    """

    def __init__(self, device: torch.device, window: int, last: int) -> None:
        self.device = device
        self.window = window
        self.last = last
        self.rise: MemoryRise | None = None
        self.bytes = 0.0
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)
        if self.rise is None and record.step == self.window:
            self.rise = MemoryRise(self.device)  # the optimizer state exists now and keeps its size
        if self.rise is not None and record.step == self.last:
            self.bytes = self.rise.bytes()


def train_steps(trainer: Trainer, count: int) -> tuple[list[StepRecord], float]:
    """Train the first `count` steps.

    Returns the record of each step, and the peak bytes during a step minus the bytes that stay
    allocated between steps.
    """
    window = _window(count)
    watch = MemoryWatch(trainer.backend.device, window, count)
    trainer.settings = replace(
        trainer.settings,
        steps=count + 1,  # no step is the last one, so that no checkpoint is saved
        log_every=window,
        checkpoint_every=count + 1,
    )
    trainer.fit(max_steps=count, on_step=watch.on_step)
    return watch.records, watch.bytes


def _window(count: int) -> int:
    """Return the number of steps between two log records: a quarter of the `count` steps.

    If `count` is not divisible by 4, the result is 1. The host waits for the device at each log
    record, so frequent records would slow training down.
    """
    return count // 4 if count % 4 == 0 else 1


def measure_pace(steps: Sequence[StepRecord], device: torch.device) -> Pace:
    """Return the mean training speed, without the first quarter of the steps (warm-up)."""
    timed = steps[max(1, len(steps) // 4) :] or steps
    seconds = sum(step.seconds for step in timed)
    tokens = sum(step.tokens for step in timed)
    return Pace(tokens / seconds, seconds / len(timed), *peak_flops(device))


def _backbone_flops(session: TrainingSession[Run]) -> float:
    """Return the FLOPs of the backbone per token in one forward pass of the objective."""
    run = session.run
    data = run.data
    rows = np.arange(2)
    batch = batch_rows(data.train_rows, rows, index=rows, conditions=data.train_conditions)
    with count_flops() as counter, count_logits(run.denoiser.head) as logits:
        _loss(run.objective, batch, session.rng_at(0, batch), slots=2)
    of_head = 2.0 * run.denoiser.head.width * logits.total
    return (counter.get_total_flops() - of_head) / int(batch.tokens.sum())


# ---------------------------------------------------------------------- the first loss


class ZeroBackbone(Backbone):
    """Backbone that returns a tensor [B,L,1] of zeros as hidden states."""

    width = 1
    reads_time = False

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return torch.zeros(*ids.shape, 1, device=ids.device)


def _initial_loss(session: TrainingSession[Run]) -> InitialLoss | None:
    """Estimate the expected loss before the first training step.

    Initially the output matrix of a head is zero. The predicted distribution then depends only on
    the biases of the head and not on the hidden states, so a backbone is not needed. Returns None
    if the matrix is not zero, as with pretrained weights.
    """
    run = session.run
    if bool(run.denoiser.head.table.any()):
        return None
    recipe = run.recipe
    data = run.data
    objective = _biases_only(run)
    rows = len(data.train_rows)
    fitting = GROUP_LOGITS // (recipe.length * run.vocabulary.num_tokens)
    size = max(1, min(rows // GROUPS, recipe.train.batch, fitting))
    losses = []
    for group in range(GROUPS):
        numbers = (np.arange(size) + group * size) % rows
        batch = batch_rows(
            data.train_rows, numbers, index=np.arange(size), conditions=data.train_conditions
        )
        rng = CounterRng(recipe.seed + 1, group, batch.index, recipe.length)
        losses.append(_loss(objective, batch, rng, slots=size))
    deviation = statistics.stdev(losses)
    return InitialLoss(
        mean=statistics.fmean(losses),
        error=deviation / GROUPS**0.5,
        spread=deviation * (size / recipe.train.batch) ** 0.5,
        of_step_1=_first_step_loss(session, objective),
    )


def _biases_only(run: Run) -> Objective:
    """Build an objective like that of a run, with a backbone that outputs zeros.

    The head has the biases of the run's head.
    """
    model = assemble(
        run.recipe, run.vocabulary, run.device, process=run.process, backbone=ZeroBackbone()
    )
    state = run.denoiser.head.state_dict()
    biases = {name: value for name, value in state.items() if name != "table"}
    model.denoiser.head.load_state_dict(biases, strict=False)
    return model.objective


def _first_step_loss(session: TrainingSession[Run], objective: Objective) -> float:
    """Return the loss of `objective` on the rows, noise times and noise of step 1."""
    keys = session.recipe.train
    batches = [session.run.data.batch_at(0, micro) for micro in range(keys.accumulate)]
    tokens = sum(int(batch.tokens.sum()) for batch in batches)
    losses = [
        _loss(objective, batch, session.rng_at(0, batch), keys.batch, tokens) for batch in batches
    ]
    return sum(losses)


@torch.no_grad()
def _loss(
    objective: Objective, batch: Batch, rng: CounterRng, slots: int, tokens: int | None = None
) -> float:
    """Return the loss of an objective on a batch, in nats per token.

    `slots`: number of sequences in the global batch. The sum over tokens is divided by `tokens`. If
    `tokens` is None, the sum is divided by the number of counted tokens in `batch`.
    """
    counts = {}
    for name, count in objective.counts(batch).items():
        own = torch.as_tensor(count, dtype=torch.float64)
        counts[name] = own if tokens is None else torch.full_like(own, tokens)
    return float(objective(batch, rng, counts, slots).loss)
