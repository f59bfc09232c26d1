"""`ddiff run --dry-run --measure N`: what a recipe costs, by counting and by its first N steps, which leave nothing behind.

The steps are those of one process with its share of every batch. Text that is not here (nothing is fetched) is stood in for
by random tokens of the recipe's vocabulary.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from ddiff.core.rng import CounterRng
from ddiff.data.batch import Batch
from ddiff.data.conditions import Conditions
from ddiff.data.packing import Rows, batch_rows, pack_ids
from ddiff.data.tokenizer import AlphabetTokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.build import Overrides, build_backend, build_objective, outlined
from ddiff.runs.cost import (
    TRAINING,
    Footprint,
    Parameters,
    counted,
    flops,
    free_bytes,
    gathered,
    num_bytes,
    peak,
)
from ddiff.runs.peak_memory import Rise
from ddiff.runs.run import Run, build_run
from ddiff.training.device import get_device
from ddiff.training.metrics import FILE as METRICS
from ddiff.training.metrics import StepRecord
from ddiff.training.protocols import Objective
from ddiff.training.trainer import Trainer

STAND_IN_ROWS = 4096
GROUPS = 16  # of rows, over which the first loss is expected
GROUP_LOGITS = 2**25  # that a group may want: a second on a CPU
ROUNDING = (
    1e-3  # by which the first loss may miss the head's first law, relative: sums in another order
)
COPIES = 4  # of the parameters that training holds at least, with AdamW: themselves, gradients, two moments


class Cost(NamedTuple):
    """By counting. FLOPs are of a forward, per token; bytes are of one process that holds everything."""

    parameters: Parameters
    trunk_flops: float
    head_flops: float
    logits: float  # per token
    footprint: Footprint
    gathered: int  # bytes that are gathered at once where the model is sharded
    checkpoint: float

    @property
    def flops(self) -> float:
        """Of training, per token."""
        return TRAINING * (self.trunk_flops + self.head_flops)


class Pace(NamedTuple):
    """By the clock, of one process on one device."""

    tokens_per_second: float
    step_seconds: float
    peak: float
    peak_from: str


class FirstLaw(NamedTuple):
    """The loss of the head's first law, no network asked, in nats per token."""

    mean: float  # over rows, times and noise
    error: float  # of that mean
    spread: float  # of one step's loss about it
    there: float  # on the rows, times and noise of the first step


@dataclass(frozen=True)
class Measurement:
    """A recipe and what was found; `stand_in` says why its text is stood in for, empty where it is not."""

    recipe: Recipe
    device: torch.device
    stand_in: str
    num_tokens: int
    cost: Cost
    pace: Pace
    first_loss: float
    first_law: FirstLaw | None  # None: the run begins with other weights
    unigram: float  # nats per token

    @property
    def mfu(self) -> float:
        return self.cost.flops * self.pace.tokens_per_second / self.pace.peak

    @property
    def is_off(self) -> bool:
        """Whether the first loss is another than the head's first law has on the same rows, times and noise."""
        if self.first_law is None:
            return False
        return not abs(self.first_loss - self.first_law.there) <= ROUNDING * max(
            1.0, abs(self.first_law.there)
        )


def measure(recipe: Recipe, count: int) -> Measurement:
    """Build the recipe as one of its processes, take `count` training steps in a place of their own, and count."""
    with tempfile.TemporaryDirectory(prefix="ddiff-measure-") as directory:
        alone = _alone(recipe, directory)
        _check_room(alone)
        run, stand_in = _built(alone)
        run.begin()
        first_law, trunk_flops = _first_law(run), _trunk_flops(run)
        run.distribute()
        head, trainer = run.denoiser.head, run.trainer()
        with counted(head) as logits:
            steps, rise = _stepped(trainer, count)
        tokens = sum(step["tokens"] for step in steps)
        denoiser = run.denoiser
        footprint = Footprint(
            parameters=num_bytes(list(denoiser.parameters())),
            gradients=num_bytes(
                [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
            ),
            optimizer=num_bytes(trainer.optimizer.state_dict()),
            average=num_bytes(trainer.average.weights) if trainer.average else 0,
            activations=rise,
        )
        cost = Cost(
            parameters=Parameters.of(denoiser),
            trunk_flops=trunk_flops,
            head_flops=2.0 * head.width * logits.count / tokens,
            logits=logits.count / tokens,
            footprint=footprint,
            gathered=gathered(denoiser),
            checkpoint=num_bytes(dict(denoiser.state_dict()))
            + footprint.optimizer
            + footprint.average,
        )
        return Measurement(
            recipe=recipe,
            device=run.backend.device,
            stand_in=stand_in,
            num_tokens=run.vocabulary.num_tokens,
            cost=cost,
            pace=_pace(steps, run.backend.device),
            first_loss=steps[0]["train_loss"],
            first_law=first_law,
            unigram=_unigram(run),
        )


def _alone(recipe: Recipe, directory: str) -> Recipe:
    """The recipe of one of its processes, with that one's share of the batch."""
    share = recipe.train.batch // recipe.backend_keys.processes
    settings = [f"run_dir={json.dumps(directory)}", f"train.batch={share}", "tracker=none"]
    return parse_recipe(
        recipe.to_toml(), recipe.name, [*settings, "backend.kind=single", "backend.processes=1"]
    )


def _check_room(recipe: Recipe) -> None:
    """ArgumentError where the parameters alone, as training holds them, have no room."""
    vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
    if vocabulary is None:
        return
    denoiser = outlined(recipe, vocabulary)
    backend = build_backend(recipe)
    needed, free = COPIES * num_bytes(list(denoiser.parameters())), free_bytes(backend.device)
    backend.close()
    rows = recipe.train.batch // recipe.train.accumulate
    kept: float = (
        0
        if recipe.backend_keys.activation_checkpointing
        else rows * _kept_of_a_row(denoiser, recipe.length)
    )
    if denoiser.precision is not None:  # products are kept in half the bytes
        kept /= 2
    if needed <= free < needed + kept:
        raise ArgumentError(
            f"--measure: {recipe.name} keeps about {kept / 2**30:.1f} GiB for the backward of {rows} rows at a time, "
            f"beside {needed / 2**30:.1f} GiB of parameters, gradients and moments; {backend.device} has "
            f"{free / 2**30:.1f} GiB free. Measure fewer at a time: --set train.accumulate=N, more processes, or "
            f"--set backend.processes=1 --set train.batch={max(1, int(rows * (free - needed) / (2 * kept)))}."
        )
    if needed > free:
        raise ArgumentError(
            f"--measure: {recipe.name} has {Parameters.of(denoiser).total:,} parameters, which with gradients and the two "
            f"moments of AdamW take {needed / 2**30:.1f} GiB; {backend.device} has {free / 2**30:.1f} GiB free. Measure "
            "where there is more, or a part of it: --set denoiser.layers=2."
        )


def _kept_of_a_row(denoiser: Denoiser, length: int) -> int:
    """Bytes that the trunk keeps of a row for its backward, without what attention may spare; 0 where nobody can tell."""
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] != (length, length):
            kept[tensor.untyped_storage()._cdata] = (
                tensor  # held, so that no other storage has its number
            )
        return tensor

    device = get_device(denoiser)
    ids, t = (
        torch.zeros(1, length, dtype=torch.long, device=device),
        torch.zeros(1, length, device=device).double(),
    )
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            denoiser.backbone(ids, t, UNPADDED)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # a trunk that computes with values, and has none here
        return 0
    return sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights
    )


# ------------------------------------------------------------------ text


def _built(recipe: Recipe) -> tuple[Run, str]:
    """The run, and why its text is stood in for."""
    try:
        return build_run(recipe, Overrides()), ""
    except (DataError, OSError) as error:
        num_tokens = recipe.tokenizer.preview()
        vocabulary = recipe.vocabulary.preview(num_tokens=num_tokens)
        if num_tokens is None or vocabulary is None:
            raise
        reason = str(error).partition("\n")[0]
    without_init = replace(recipe, train=recipe.train.model_copy(update={"init": None}))
    run = Run(without_init, _symbols(num_tokens), vocabulary, Overrides(), build_backend(recipe))
    rows = _random_rows(num_tokens, recipe.length, recipe.seed)
    none = Conditions({})
    vars(run).update(
        train_rows=rows, validation_rows=rows, train_conditions=none, validation_conditions=none
    )
    return run, reason


def _symbols(num_tokens: int) -> AlphabetTokenizer:
    """Some tokenizer of that size: no text is read."""
    surrogates = range(0xD800, 0xE000)
    codes = (code for code in range(num_tokens + len(surrogates)) if code not in surrogates)
    return AlphabetTokenizer([chr(code) for code, _ in zip(codes, range(num_tokens))])


def _random_rows(num_tokens: int, length: int, seed: int) -> Rows:
    """Rows of independent tokens that are as unequally frequent as words (Zipf's law)."""
    random = np.random.default_rng(seed)
    share = 1.0 / (np.arange(num_tokens) + 2.7)
    ids = random.permutation(num_tokens)[
        random.choice(num_tokens, (STAND_IN_ROWS, length), p=share / share.sum())
    ]
    return pack_ids(ids, num_tokens)


def _unigram(run: Run) -> float:
    """Nats per token of the training text under its own counts, each raised by one: what a bound starts from."""
    counts = run.train_rows.token_counts()
    log_share = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    return -float((counts * log_share).sum() / counts.sum())


# ------------------------------------------------------------------ steps


@final
class MemoryWatch:
    """Bytes by which memory rises above what is held after the first `window` steps."""

    def __init__(self, device: torch.device, window: int, last: int) -> None:
        self.device = device
        self.window = window
        self.last = last
        self.rise: Rise | None = None
        self.bytes = 0.0

    def on_step(self, record: StepRecord) -> None:
        if self.rise is None and record.step == self.window:
            self.rise = Rise(self.device)  # the optimizer has its state now, and stays as large
        if self.rise is not None and record.step == self.last:
            self.bytes = self.rise.bytes()


def _stepped(trainer: Trainer, count: int) -> tuple[list[dict[str, float]], float]:
    """The lines of the first steps in metrics.jsonl, and the bytes by which memory rises above what stands between two."""
    window = _window(count)
    watch = MemoryWatch(trainer.backend.device, window, count)
    trainer.settings = replace(
        trainer.settings,
        steps=count + 1,  # no step is the last, so nothing is saved
        log_every=window,
        checkpoint_every=count + 1,
    )
    trainer.fit(max_steps=count, on_step=watch.on_step)
    lines = Path(trainer.run_dir, METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], watch.bytes


def _window(count: int) -> int:
    """Steps between two looks at the figures, for which a device must be waited: a quarter of all if that divides them."""
    return count // 4 if count % 4 == 0 else 1


def _pace(steps: Sequence[Mapping[str, float]], device: torch.device) -> Pace:
    """The mean step once the first quarter has warmed up: a step whose figures are read waits for those before it."""
    timed = steps[max(1, len(steps) // 4) :] or steps
    seconds = sum(step["seconds"] for step in timed)
    return Pace(
        sum(step["tokens"] for step in timed) / seconds, seconds / len(timed), *peak(device)
    )


def _trunk_flops(run: Run) -> float:
    """FLOPs of the trunk per token in one forward, as an objective runs it."""
    batch = batch_rows(
        run.train_rows, np.arange(2), index=np.arange(2), conditions=run.train_conditions
    )
    with flops() as counter, counted(run.denoiser.head) as logits:
        _loss(
            run,
            run.objective,
            batch,
            CounterRng(run.recipe.seed, 0, batch.index, run.recipe.length),
            slots=2,
        )
    return (counter.get_total_flops() - 2.0 * run.denoiser.head.width * logits.count) / int(
        batch.scored.sum()
    )


# ------------------------------------------------------------------ the first loss


class Blank(nn.Module):
    """A trunk that says nothing: hidden states [B,L,1] of zeros."""

    width = 1
    reads_time = False

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return torch.zeros(*ids.shape, 1, device=ids.device)


def _first_law(run: Run) -> FirstLaw | None:
    """None where the head's table has come from elsewhere.

    A head begins with a table of zeros: its law is that of its biases, whatever the trunk says, and can be had without one.
    """
    head = run.denoiser.head
    if bool(head.table.any()):
        return None
    objective = _blank_objective(run)
    rows, length = len(run.train_rows), run.recipe.length
    size = max(
        1,
        min(
            rows // GROUPS,
            run.recipe.train.batch,
            GROUP_LOGITS // (length * run.vocabulary.num_tokens),
        ),
    )
    losses = []
    for group in range(GROUPS):
        numbers = (np.arange(size) + group * size) % rows
        batch = batch_rows(
            run.train_rows, numbers, index=np.arange(size), conditions=run.train_conditions
        )
        losses.append(
            _loss(
                run,
                objective,
                batch,
                CounterRng(run.recipe.seed + 1, group, batch.index, length),
                slots=size,
            )
        )
    deviation = statistics.stdev(losses)
    spread = deviation * (size / run.recipe.train.batch) ** 0.5
    return FirstLaw(
        statistics.fmean(losses), deviation / GROUPS**0.5, spread, _first_step(run, objective)
    )


def _blank_objective(run: Run) -> Objective:
    """The recipe's objective on the head's first law."""
    assert run.recipe.head is not None
    head = run.recipe.head.build(vocabulary=run.vocabulary, width=Blank.width)
    biases = {
        name: value for name, value in run.denoiser.head.state_dict().items() if name != "table"
    }
    head.load_state_dict(biases, strict=False)
    blank = Denoiser(Blank(), head, run.recipe.denoiser_keys.given).to(run.backend.device)
    return build_objective(run.recipe, run.process, blank)


def _first_step(run: Run, objective: Objective) -> float:
    """The loss on all of the first step's rows, with its times and noise."""
    keys, trainer = run.recipe.train, run.trainer()
    batches = [trainer.batch_at(0, micro) for micro in range(keys.accumulate)]
    tokens = sum(int(batch.scored.sum()) for batch in batches)
    return sum(
        _loss(run, objective, batch, trainer.rng_at(0, batch), keys.batch, tokens)
        for batch in batches
    )


@torch.no_grad()
def _loss(
    run: Run,
    objective: Objective,
    batch: Batch,
    rng: CounterRng,
    slots: int,
    tokens: int | None = None,
) -> float:
    """An objective's loss on some rows, over its own count or over `tokens`."""
    own = {
        name: torch.as_tensor(count, dtype=torch.float64)
        for name, count in objective.counts(batch).items()
    }
    counts = (
        own
        if tokens is None
        else {name: torch.full_like(count, tokens) for name, count in own.items()}
    )
    return float(objective(batch, rng, counts, slots).loss)
