"""Keys of a recipe that ddiff itself defines, for every table.

The other keys of a table are defined by the component that the key `kind` names.
`ddiff.recipe.fields_keys` has the keys that only a recipe of several fields has.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

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
"""Largest size of a file name in bytes. Most file systems allow 255 bytes.

The difference leaves room for endings that ddiff appends, such as `.part`."""

PATH_BYTES = 3800
"""Largest size of a path in bytes. Linux allows 4096 bytes.

The difference leaves room for files that ddiff writes two folders below a run directory."""

Processes = Annotated[int, Field(gt=0, le=1024)]
"""Number of processes on one machine."""

Threads = Annotated[int, Field(ge=0, le=256)]
"""Number of threads of one process."""

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay of an exponential moving average, in [0, 1)."""


class TopLevelKeys(ComponentConfig):
    """Top-level keys of a recipe."""

    name: str = Field(min_length=1)
    """Name of the run."""
    seed: Seed = 0
    """Seed of initial weights, data order, training noise and dropout."""
    run_dir: str = ""
    """Directory of the run; by default `runs/<name>`."""
    plugins: tuple[str, ...] = ()
    """Names of the plugins whose components the recipe uses."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError(
                "a name must not be a path or contain a slash, backslash or control character; got "
                f"{name!r}. Use run_dir to choose the directory of the run"
            )
        _check_path("name", name)
        return name

    @field_validator("run_dir")
    @classmethod
    def _check_run_dir(cls, run_dir: str) -> str:
        _check_path("run_dir", run_dir)
        return run_dir


def _check_path(key: str, path: str) -> None:
    """Raise ValueError if a path has control characters or is too long for a file system."""
    if not path.isprintable():
        raise ValueError(f"{key} must not contain control characters; got {shorten(path)!r}")
    longest = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    size = len(os.fsencode(longest))
    if size > NAME_BYTES:
        raise ValueError(
            f"{key} must have at most {NAME_BYTES} bytes between slashes, because file names are "
            f"limited; got {size} bytes, {shorten(longest)!r}"
        )
    size = len(os.fsencode(path))
    if size > PATH_BYTES:
        raise ValueError(f"{key} must have at most {PATH_BYTES} bytes; got {size}")


class DataKeys(ComponentConfig):
    """Keys of the recipe table [data] that exist for every data set."""

    length: PositiveInt
    """Number of tokens in a row."""


class LoraKeys(ComponentConfig):
    """Keys of the recipe table [denoiser.lora]: trained adapters next to frozen weights."""

    rank: PositiveInt = 8
    """Rank of the adapters."""
    alpha: PositiveFloat = 16.0
    """Scale of the adapters, which are multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of the input of the adapters in training."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the names of the linear layers with adapters, such as "q_proj"; by default
    every linear layer of the blocks."""
    full: tuple[str, ...] = ()
    """Last parts of the names of further modules whose weights are trained whole."""


class DenoiserKeys(ComponentConfig):
    """Keys of the recipe table [denoiser] that exist for every backbone."""

    given: Literal["rest", "all"] = "rest"
    """States that the predicted distribution at a visible (unmasked) position is conditioned on.

    "rest": the states of all other positions. "all": the states of all positions, including the
    position itself. With "all", plain cross-entropy trains the head, and the engine divides the
    prediction by the likelihood of the position's own state. A head with its own parameterization
    ignores this key."""
    lora: LoraKeys | None = None
    """Train LoRA adapters next to the weights of [train] init or of a pretrained backbone, which
    stay frozen; by default every weight is trained."""


class InitKeys(ComponentConfig):
    """Keys of the recipe table [train.init]: source of the initial weights."""

    run: str | None = Field(None, min_length=1)
    """Directory of the run whose weights are loaded."""
    model: str | None = Field(None, min_length=1)
    """Directory or hub name of a transformers model whose input embeddings are loaded."""
    parts: Literal["all", "embeddings"] = "all"
    """Weights to load from the run: all weights, or only the state embeddings."""

    @model_validator(mode="after")
    def _check_one_source(self) -> InitKeys:
        if self.run is None and self.model is None:
            came = "neither"
        elif self.run is not None and self.model is not None:
            came = f"run = {self.run!r} and model = {self.model!r}"
        else:
            return self
        raise ValueError(f'exactly one of the keys "run" and "model" must be given; got {came}')


class TrainLoopKeys(ComponentConfig):
    """Keys of the recipe table [train] that do not depend on the data."""

    steps: PositiveInt
    """Number of training steps."""
    batch: PositiveInt
    """Number of rows in the global batch of one step."""
    warmup: NonNegativeInt = 100
    """Number of steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate schedule after the warmup."""
    floor: Probability = 0.1
    """Final learning rate of the cosine schedule, as a fraction of the largest one."""
    clip: PositiveFloat = 1.0
    """Gradient norm above which the gradient is scaled down (clipping)."""
    accumulate: PositiveInt = 1
    """Number of micro-batches into which the batch of a step is split."""
    log_every: PositiveInt = 10
    """Number of steps between two lines of progress."""
    checkpoint_every: PositiveInt = 200
    """Number of steps between two checkpoints."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""

    @model_validator(mode="after")
    def _check_batch_divides(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(
                "batch must be a multiple of accumulate; got "
                f"batch = {self.batch}, accumulate = {self.accumulate}"
            )
        return self


class TrainKeys(TrainLoopKeys):
    """Keys of the recipe table [train]."""

    prefix: Probability = 0.0
    """Fraction of the training rows that begin with a prompt of uniformly drawn length.

    The tokens of a prompt stay clean and do not count in the loss."""
    embeddings: Literal["random", "cooccurrence"] = "random"
    """First embeddings of the tokens, if the network has a table of them.

    "random": draws from a normal distribution. "cooccurrence": computed from counts of neighbouring
    tokens in the training text, which shortens the training."""
    init: InitKeys | None = None
    """Source of the initial weights: a run with the same tokenizer, or a transformers model."""
    ema: Decay = 0.0
    """Decay of the exponential moving average of the weights, such as 0.9999; 0: no average."""


class BackendKeys(ComponentConfig):
    """Keys of the recipe table [backend] that exist for every backend."""

    device: str = "auto"
    """Device of the network, such as "cpu" or "cuda:0"; "auto": a GPU if there is one."""
    processes: Processes = 1
    """Number of processes on this machine, which split [train] batch evenly.

    More than one process needs kind = "ddp" or "fsdp"."""
    precision: Literal["auto", "native", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; "auto": bfloat16 on a GPU, float32 on the CPU.

    "native": bfloat16 on a GPU and on a CPU with bfloat16 units, where a step of a small network
    takes two thirds of the time; the results then depend on the type of the CPU.

    Weights, distributions and sums have at least float32 precision."""
    compile: bool = False
    """Compile the blocks of the backbone (torch.compile); the first step takes about a minute."""
    workers: Threads = 1
    """Number of threads that load batches in advance; 0: none. Does not change the results."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in backward, to save memory."""


class EvaluateKeys(ComponentConfig):
    """Keys of the recipe table [evaluate], for the likelihood bound on validation rows."""

    every: PositiveInt | None = None
    """Number of training steps between two evaluations; by default only after the last step."""
    batch: PositiveInt = 64
    """Number of rows in a batch."""
    window: tuple[float, float] = (1e-3, 0.999)
    """Limits of the integral over tau that is the diffusion term of the bound.

    tau in [0, 1] is the information time: the fraction of the information about a token that is
    lost. The decoding term of the bound covers tau below the lower limit. The prior term (the KL
    divergence to the prior) covers tau above the upper limit."""
    draws: PositiveInt = 1
    """Number of noise times drawn per row.

    With two or more, the confidence interval is computed from the differences between documents."""
    rows: PositiveInt | None = None
    """Number of rows to evaluate, spread evenly over the validation text; by default all."""
    seed: Seed = 0
    """Seed of the noise times and the noise."""
    weights: Literal["auto", "ema", "trained"] = "auto"
    """Weights for evaluation and sampling.

    "auto": the moving average if [train] ema is not 0, else the trained weights."""

    @model_validator(mode="after")
    def _check_window(self) -> EvaluateKeys:
        start, stop = self.window
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(
                "window must be two values of tau with 0 <= start < stop <= 1; got "
                f"[{start}, {stop}]"
            )
        return self


class SampleKeys(ComponentConfig):
    """Keys of the recipe table [sample] that exist for every sampler."""

    steps: PositiveInt = 64
    """Number of sampling steps."""
    count: PositiveInt = 8
    """Number of samples."""
    batch: PositiveInt = 8
    """Number of samples in a batch. Does not change the samples."""
    gaps: NonNegativeInt = 8
    """Number of sentences of the validation documents with a gap that the model fills; 0: none."""
    gap_temperature: NonNegativeFloat = 0.5
    """Temperature at which gaps are filled. Samplers without a temperature do not use it."""
    seed: Seed = 0
    """Seed of the samples."""
    every: PositiveInt | None = None
    """Number of training steps between two samples that are drawn and shown during training.

    Such a sample has at most 16 steps. By default, samples are drawn only after the last step."""
    conditions: dict[str, NonNegativeInt | tuple[float, ...]] = Field(default_factory=dict)
    """Label or vector for each name in [denoiser] conditions."""
    guidance: NonNegativeFloat = 1.0
    """Weight of classifier-free guidance.

    0: unconditional samples; 1: no guidance; above 1: the conditions have more influence."""
