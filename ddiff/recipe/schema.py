"""What a recipe may hold: the keys above its tables, and each table's owner, keys and slots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from ddiff.errors import shorten
from ddiff.plugin.config import (
    ComponentConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
)

NAME_BYTES = 200  # of a file name: systems take 255, and ddiff writes others beside it (.NAME.lock, NAME.part)
PATH_BYTES = 3800  # of a whole path: systems take 4096, and checkpoints lie two folders below

Processes = Annotated[int, Field(gt=0, le=1024)]
"""Processes on one machine."""

Threads = Annotated[int, Field(ge=0, le=256)]
"""Threads of one process."""


class TopLevelKeys(ComponentConfig):
    """The keys above all tables."""

    name: str = Field(min_length=1)
    seed: Seed = 0
    run_dir: str = ""
    """Where the run is written; `runs/<name>` when it is left out."""
    plugins: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, name: str) -> str:
        if name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError(
                f"a name is no path: it takes no slash, backslash or control character; got {name!r}. "
                "Say with run_dir where the run is written"
            )
        _check_path("name", name)
        return name

    @field_validator("run_dir")
    @classmethod
    def _can_be_a_path(cls, run_dir: str) -> str:
        _check_path("run_dir", run_dir)
        return run_dir


def _check_path(key: str, path: str) -> None:
    """Raises ValueError for what no file system takes as a path."""
    if not path.isprintable():
        raise ValueError(f"{key} takes no control characters; got {shorten(path)!r}")
    longest = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > NAME_BYTES:
        raise ValueError(
            f"{key} must have at most {NAME_BYTES} bytes between slashes, since it names a folder; got "
            f"{len(os.fsencode(longest))} bytes, {shorten(longest)!r}"
        )
    if len(os.fsencode(path)) > PATH_BYTES:
        raise ValueError(
            f"{key} must have at most {PATH_BYTES} bytes; got {len(os.fsencode(path))}"
        )


class DataKeys(ComponentConfig):
    """What the engine reads in [data]."""

    length: PositiveInt
    """Tokens in a row."""


class DenoiserKeys(ComponentConfig):
    """What the engine reads in [denoiser], beside the head's own table."""

    given: Literal["rest", "all"] = "rest"
    """What the law of a visible position is trained to know: the rest of the sequence, or its own state too (plain
    cross-entropy at visible rows); the engine divides own evidence out of the latter. A head with a reading ignores it."""


class InitKeys(ComponentConfig):
    """[train] init: whose weights this run starts with, another run's or a model's of the transformers library."""

    run: str | None = Field(None, min_length=1)
    """The directory of another run."""
    model: str | None = Field(None, min_length=1)
    """In place of a run: a directory or hub name, whose input embeddings become those of the words."""
    parts: Literal["all", "embeddings"] = "all"
    """All weights of that run, or its embeddings of states alone."""

    @model_validator(mode="after")
    def _one_source(self) -> InitKeys:
        if (self.run is None) == (self.model is None):
            came = (
                "neither" if self.run is None else f"run = {self.run!r} and model = {self.model!r}"
            )
            raise ValueError(
                f'name either "run", or "model", whose embeddings are taken; got {came}'
            )
        return self


class TrainKeys(ComponentConfig):
    """[train], beside the optimizer's own table."""

    steps: PositiveInt
    batch: PositiveInt
    """Rows in the global batch of one step."""
    warmup: NonNegativeInt = 100
    """Steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: Probability = 0.1
    """The share of the learning rate at which the cosine ends."""
    clip: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    accumulate: PositiveInt = 1
    """Micro-batches that a step's batch is cut into."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 200
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    prefix: Probability = 0.0
    """The share of the training rows whose first tokens, uniformly many, are shown clean and not scored: prompts."""
    init: InitKeys | None = None
    """Start with the weights of another run on the same tokenizer (fine-tuning)."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Keep a moving average of the weights with this decay, such as 0.9999, and evaluate it; 0: none."""

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainKeys:
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate; got batch = {self.batch}, accumulate = {self.accumulate}"
            )
        return self


class BackendKeys(ComponentConfig):
    """What the engine reads in [backend]."""

    device: str = "auto"
    processes: Processes = 1
    """Processes on this machine, each with its share of [train] batch; more than one with kind = "ddp" or "fsdp"."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights, laws and sums are float32 at least. "auto": bfloat16 on a GPU, float32 on the CPU."""
    compile: bool = False
    """Compile the blocks of the trunk (torch.compile); the first step then takes a minute or so."""
    workers: Threads = 1
    """Threads that read batches ahead of the step that asks for them; 0: none. No bit depends on it."""
    activation_checkpointing: bool = False
    """Keep of each block its input alone and compute the rest again in the backward: less memory, more work."""


class EvaluateKeys(ComponentConfig):
    """[evaluate]: the bound on the validation rows."""

    every: PositiveInt | None = None
    """Steps between evaluations while training, logged and shown; without it the run is evaluated at its end only."""
    batch: PositiveInt = 64
    window: tuple[float, float] = (1e-3, 0.999)
    """Shares of tau between which the diffusion term is integrated; the two end terms cover the rest."""
    draws: PositiveInt = 1
    """Times drawn per row; two or more tell the error of the estimate from the differences between documents."""
    rows: PositiveInt | None = None
    """How many rows are read, spread evenly over the validation text; all if not given."""
    seed: Seed = 0
    weights: Literal["auto", "ema", "trained"] = "auto"
    """Which weights are evaluated, sampled and loaded; "auto": the average where [train] ema keeps one."""

    @model_validator(mode="after")
    def _window_is_inside(self) -> EvaluateKeys:
        start, stop = self.window
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(
                f"window must be two shares of tau with 0 <= start < stop <= 1; got [{start}, {stop}]"
            )
        return self


class SampleKeys(ComponentConfig):
    """[sample], beside the sampler's own table."""

    steps: PositiveInt = 64
    count: PositiveInt = 8
    batch: PositiveInt = 8
    seed: Seed = 0
    conditions: dict[str, NonNegativeInt | tuple[float, ...]] = Field(default_factory=dict)
    """What the network is told, of [denoiser] conditions: a label, or a vector."""
    guidance: NonNegativeFloat = 1.0
    """1: the law under the conditions; 0: the law without; above 1: more of them (classifier-free guidance)."""


class Slot(NamedTuple):
    """A place that names a component: its kind, and the name it has when the recipe gives none."""

    kind: str
    default: str | None


class Table(NamedTuple):
    """A table of a recipe: the keys that the engine reads, whose the others are, and its slots."""

    component: Slot | None = None
    keys: type[ComponentConfig] | None = None
    slots: Mapping[str, Slot] = {}
    optional: bool = False

    def engine_keys(self) -> list[str]:
        return [*self.slots, *(self.keys.model_fields if self.keys else ())]


TABLES: dict[str, Table] = {
    "data": Table(Slot("dataset", None), DataKeys),
    "tokenizer": Table(Slot("tokenizer", None)),
    "vocabulary": Table(Slot("vocabulary", None)),
    "process": Table(Slot("process", None), optional=True),
    "denoiser": Table(Slot("backbone", None), DenoiserKeys, slots={"head": Slot("head", "tokens")}),
    "objective": Table(
        Slot("objective", "nelbo"),
        slots={"loss": Slot("training_loss", "elbo"), "times": Slot("time_rule", "flat")},
    ),
    "train": Table(None, TrainKeys, {"optimizer": Slot("optimizer", "adamw")}),
    "backend": Table(Slot("backend", "single"), BackendKeys),
    "evaluate": Table(None, EvaluateKeys),
    "sample": Table(None, SampleKeys, {"sampler": Slot("sampler", "ancestral")}),
    "tracker": Table(Slot("tracker", "none")),
}

SLOTS: dict[tuple[str, ...], Slot] = {
    **{(name,): table.component for name, table in TABLES.items() if table.component},
    **{(name, key): slot for name, table in TABLES.items() for key, slot in table.slots.items()},
}
"""Every place in a recipe that names a component."""

TOP_LEVEL = [*TopLevelKeys.model_fields, "extends", *TABLES]
