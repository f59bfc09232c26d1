"""Schema of a recipe: top-level keys, and component, engine keys and slots of each table.

`TABLES` is the one list of what a recipe holds. The fields of `Recipe`, their order in a written
recipe, and the messages about unknown names follow from it.
"""

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

NAME_BYTES = 200
"""Largest size of a file name. Systems take 255, and ddiff adds endings (.NAME.lock, NAME.part)."""

PATH_BYTES = 3800
"""Largest size of a whole path. Systems take 4096, and checkpoints lie two folders below."""

Processes = Annotated[int, Field(gt=0, le=1024)]
"""Processes on one machine."""

Threads = Annotated[int, Field(ge=0, le=256)]
"""Threads of one process."""


# ---------------------------------------------------------------------- keys that the engine reads


class TopLevelKeys(ComponentConfig):
    """Keys above all tables."""

    name: str = Field(min_length=1)
    seed: Seed = 0
    run_dir: str = ""
    """Directory of the run; by default `runs/<name>`."""
    plugins: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError(
                "a name cannot be a path: it takes no slash, backslash or control character; got "
                f"{name!r}. Say with run_dir where the run is written"
            )
        _check_path("name", name)
        return name

    @field_validator("run_dir")
    @classmethod
    def _check_run_dir(cls, run_dir: str) -> str:
        _check_path("run_dir", run_dir)
        return run_dir


def _check_path(key: str, path: str) -> None:
    """Raise ValueError for a path that no file system takes."""
    if not path.isprintable():
        raise ValueError(f"{key} takes no control characters; got {shorten(path)!r}")
    longest = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    size = len(os.fsencode(longest))
    if size > NAME_BYTES:
        raise ValueError(
            f"{key} must have at most {NAME_BYTES} bytes between slashes, since it names a folder; "
            f"got {size} bytes, {shorten(longest)!r}"
        )
    size = len(os.fsencode(path))
    if size > PATH_BYTES:
        raise ValueError(f"{key} must have at most {PATH_BYTES} bytes; got {size}")


class DataKeys(ComponentConfig):
    """Keys of the engine in [data]."""

    length: PositiveInt
    """Tokens in a row."""


class DenoiserKeys(ComponentConfig):
    """Keys of the engine in [denoiser], in addition to the head's own table."""

    given: Literal["rest", "all"] = "rest"
    """Observations that the predicted distribution at a visible position is conditioned on.

    "rest": the other positions; "all": its own state too (plain cross-entropy at visible rows), and
    the engine divides that evidence out. Ignored by a head with its own parameterization."""


class InitKeys(ComponentConfig):
    """[train] init: initial weights, of another run or of a model of the transformers library."""

    run: str | None = Field(None, min_length=1)
    """Directory of another run."""
    model: str | None = Field(None, min_length=1)
    """In place of a run: a directory or hub name, whose input embeddings initialise the tokens'."""
    parts: Literal["all", "embeddings"] = "all"
    """All weights of that run, or only its embeddings of states."""

    @model_validator(mode="after")
    def _check_one_source(self) -> InitKeys:
        if self.run is None and self.model is None:
            came = "neither"
        elif self.run is not None and self.model is not None:
            came = f"run = {self.run!r} and model = {self.model!r}"
        else:
            return self
        raise ValueError(f'name either "run", or "model", whose embeddings are taken; got {came}')


class TrainKeys(ComponentConfig):
    """Keys of [train], in addition to the optimizer's own table."""

    steps: PositiveInt
    batch: PositiveInt
    """Rows in the global batch of one step."""
    warmup: NonNegativeInt = 100
    """Steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: Probability = 0.1
    """Share of the learning rate at which the cosine ends."""
    clip: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    accumulate: PositiveInt = 1
    """Micro-batches that a step's batch is cut into."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 200
    keep: PositiveInt = 2
    """Number of checkpoints that are kept, the newest ones."""
    prefix: Probability = 0.0
    """Share of training rows with a prompt, whose tokens stay clean and do not count in the loss.

    Its length is drawn uniformly."""
    init: InitKeys | None = None
    """Start with the weights of another run on the same tokenizer (fine-tuning)."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the exponential moving average of the weights, such as 0.9999; 0: none is kept."""

    @model_validator(mode="after")
    def _check_batch_divides(self) -> TrainKeys:
        if self.batch % self.accumulate:
            raise ValueError(
                "batch must be a multiple of accumulate; got "
                f"batch = {self.batch}, accumulate = {self.accumulate}"
            )
        return self


class BackendKeys(ComponentConfig):
    """Keys of the engine in [backend]."""

    device: str = "auto"
    processes: Processes = 1
    """Processes on this machine, each with its share of [train] batch.

    More than one needs kind = "ddp" or "fsdp"."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights, distributions and sums are float32 at least.

    "auto": bfloat16 on a GPU, float32 on the CPU."""
    compile: bool = False
    """Compile the blocks of the backbone (torch.compile); the first step takes about a minute."""
    workers: Threads = 1
    """Threads that read batches ahead of their step; 0: none. Results do not depend on it."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in backward, to save memory."""


class EvaluateKeys(ComponentConfig):
    """Keys of [evaluate]: the likelihood bound on the validation rows."""

    every: PositiveInt | None = None
    """Steps between evaluations during training; by default only the end is evaluated."""
    batch: PositiveInt = 64
    window: tuple[float, float] = (1e-3, 0.999)
    """Shares of tau between which the diffusion term is integrated.

    The two end terms of the bound cover the rest."""
    draws: PositiveInt = 1
    """Times drawn per row; with two or more, the differences between documents give the error."""
    rows: PositiveInt | None = None
    """Number of rows, spread evenly over the validation text; by default all."""
    seed: Seed = 0
    weights: Literal["auto", "ema", "trained"] = "auto"
    """Weights to evaluate, sample and load; "auto": the moving average if [train] ema keeps one."""

    @model_validator(mode="after")
    def _check_window(self) -> EvaluateKeys:
        start, stop = self.window
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(
                "window must be two shares of tau with 0 <= start < stop <= 1; got "
                f"[{start}, {stop}]"
            )
        return self


class SampleKeys(ComponentConfig):
    """Keys of [sample], in addition to the sampler's own table."""

    steps: PositiveInt = 64
    count: PositiveInt = 8
    batch: PositiveInt = 8
    seed: Seed = 0
    conditions: dict[str, NonNegativeInt | tuple[float, ...]] = Field(default_factory=dict)
    """Values of [denoiser] conditions that the network is conditioned on: a label, or a vector."""
    guidance: NonNegativeFloat = 1.0
    """Weight of classifier-free guidance.

    0: unconditional; 1: off; above 1: follow the conditions more closely."""


# ---------------------------------------------------------------------- tables


class Slot(NamedTuple):
    """A place that names a component: kind, and default name or None."""

    kind: str
    default: str | None


class Table(NamedTuple):
    """A table of a recipe: keys of the engine, the component that owns the others, and slots."""

    component: Slot | None = None
    keys: type[ComponentConfig] | None = None
    slots: Mapping[str, Slot] = {}
    is_optional: bool = False

    def engine_keys(self) -> list[str]:
        """Names that do not belong to the table's component: slots and keys of the engine."""
        return [*self.slots, *(self.keys.model_fields if self.keys else ())]

    def has_default(self) -> bool:
        """Return whether a recipe may leave the table out."""
        if self.is_optional:
            return True
        if self.component is not None and self.component.default is None:
            return False
        fields = self.keys.model_fields.values() if self.keys else ()
        return not any(field.is_required() for field in fields)


TABLES: dict[str, Table] = {
    "data": Table(Slot("dataset", None), DataKeys),
    "tokenizer": Table(Slot("tokenizer", None)),
    "vocabulary": Table(Slot("vocabulary", None)),
    "process": Table(Slot("process", None), is_optional=True),
    "denoiser": Table(Slot("backbone", None), DenoiserKeys, {"head": Slot("head", "tokens")}),
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

TablePath = tuple[str, ...]
"""Place of a component: `("process",)`, or `("train", "optimizer")` for a slot."""


def _list_slots() -> dict[TablePath, Slot]:
    slots: dict[TablePath, Slot] = {}
    for name, table in TABLES.items():
        if table.component is not None:
            slots[name,] = table.component
        for key, slot in table.slots.items():
            slots[name, key] = slot
    return slots


SLOTS: dict[TablePath, Slot] = _list_slots()
"""Every place in a recipe that names a component, in the order of the tables."""

TOP_LEVEL = [*TopLevelKeys.model_fields, "extends", *TABLES]
"""Every name that may stand above or begin a table."""


def component_field(path: TablePath) -> str:
    """Name the field of `Recipe` for the component at a place: its last part."""
    return path[-1]


def keys_field(table: str) -> str:
    """Name the field of `Recipe` for the engine's keys of a table.

    It is the table's name, with `_keys` if that name is taken by the table's component.
    """
    return table if TABLES[table].component is None else f"{table}_keys"
