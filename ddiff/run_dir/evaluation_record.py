"""Versioned schema of `evaluation.json`, and the keys that all records of figures have.

A record contains figures, each with its interval, unit and protocol, and everything that is needed
to repeat or to check them: settings of the evaluation, fingerprints of weights, tokenizer,
vocabulary and data, plugins with versions, hardware, time and command. In addition, the record of a
text run contains the terms and parts of the bound by name, and the record of a run of several
fields contains the bounds of each target.

Files without the key `schema_version` are of version 1, which had no figures and no provenance.
`EvaluationRecord.from_tree` converts them. `ddiff.run_dir.generation_record` is the schema of
generation.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 2
"""Newest version of evaluation.json, which this version of ddiff writes."""

OWN_DATA = "validation"
"""Protocol of figures on the validation data of the run."""

LARGEST_EXPONENT = 700.0  # exp(700) is still a finite float64


class NewerSchemaError(ValueError):
    """Error about a record whose version is newer than those that this version of ddiff reads."""


class Figure(BaseModel):
    """Value with its unit, interval and protocol.

    Attributes:
        interval: 95 % confidence interval; None if it is unknown, or if the value is exact.
        unit: unit of the value, such as "nats/token".
        protocol: name of the protocol. Figures of different protocols are not comparable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    value: float = Field(allow_inf_nan=False)
    interval: tuple[float, float] | None = Field(default=None, strict=False)
    unit: str
    protocol: str


class Provenance(BaseModel):
    """Origin of a record; the only part that differs between two identical evaluations.

    Attributes:
        command: command line, or the name of the Python script.
        seconds: duration of the evaluation.
        hardware: device, threads, machine and version of torch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str | None = None
    seconds: float | None = None
    hardware: dict[str, Any] = {}


class Record(BaseModel):
    """Record of figures: the keys that all records have. Unknown keys are kept.

    A subclass is one kind of file. It sets `newest_version`, and converts older versions.

    Attributes:
        schema_version: version of the schema of the file.
        step: training step of the weights.
        weights: "ema" for the exponential moving average of the weights, "trained" for the weights
            as they were trained.
        figures: name of a figure -> its value.
        protocol: settings of the evaluation.
        fingerprints: fingerprints of weights, tokenizer, vocabulary and data, by name.
        components: recipe key of each component -> its name, plugin and version.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    newest_version: ClassVar[int]

    schema_version: int
    step: int = Field(strict=True)
    weights: Literal["ema", "trained"]
    figures: dict[str, Figure]
    protocol: dict[str, Any]
    fingerprints: dict[str, str] = {}
    components: dict[str, str] = {}
    provenance: Provenance = Provenance()

    @classmethod
    def convert(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the content of a file of an older version in the form of the newest version."""
        return tree

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, tree: Any) -> Any:
        return cls.convert(tree) if isinstance(tree, Mapping) else tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Self:
        """Check and convert the content of a file of any version.

        Raises NewerSchemaError if the version is newer than `newest_version`, and ValueError, which
        names the key, if a value is missing or invalid.
        """
        check_version(tree, cls.newest_version)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if not key:  # several keys do not fit together, and the message names them
                raise ValueError(first["msg"].removeprefix("Value error, ")) from error
            raise ValueError(f'the key "{key}" is invalid: {first["msg"]}') from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"a figure of the evaluation is missing ({error})") from error


class EvaluationRecord(Record):
    """Content of evaluation.json.

    Attributes:
        sampler: None, because no samples are drawn.
    """

    newest_version = SCHEMA_VERSION

    sampler: dict[str, Any] | None = None

    @classmethod
    def convert(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        if "schema_version" in tree:
            return tree
        return {"schema_version": 1, **tree, "figures": dump_figures(make_figures(tree))}


def check_version(tree: Mapping[str, Any], newest: int = SCHEMA_VERSION) -> None:
    """Raise NewerSchemaError if the version of a record is newer than `newest`."""
    version = tree.get("schema_version", 1)
    if isinstance(version, int) and version > newest:
        raise NewerSchemaError(
            f"it has schema version {version}, and this version of ddiff reads versions up to "
            f"{newest}"
        )


def dump_figures(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Return figures as they are written to JSON."""
    return {name: figure.model_dump(mode="json") for name, figure in figures.items()}


def make_figures(tree: Mapping[str, Any], protocol: str = OWN_DATA) -> dict[str, Figure]:
    """Return the figures of an evaluation by name.

    `tree` is the content of evaluation.json without figures, of a text run or of a run of several
    fields. `protocol` is the name of the protocol of all figures.
    """
    if "targets" in tree:
        return dict(_target_figures(tree, protocol))
    return dict(_text_figures(tree, protocol))


def _text_figures(tree: Mapping[str, Any], protocol: str) -> Iterator[tuple[str, Figure]]:
    unit = tree["unit"]
    bound = tree["bound"].lower()
    mean = tree[f"{bound}_nats_per_{unit}"]
    interval = _pair(tree.get("interval"))
    nats = f"nats/{unit}"
    yield bound, Figure(value=mean, interval=interval, unit=nats, protocol=protocol)
    perplexities = None
    if interval is not None and interval[1] < LARGEST_EXPONENT:
        perplexities = (math.exp(interval[0]), math.exp(interval[1]))
    # a text that is given its own vector has no perplexity
    if tree["ppl"] is not None:
        yield (
            "ppl",
            Figure(
                value=tree["ppl"],
                interval=perplexities,
                unit=f"perplexity per {unit}",
                protocol=protocol,
            ),
        )
    bits = tree.get("bits_per_byte")
    if bits is not None:
        # the number of bytes is known exactly, so the interval scales with the value
        ends = None
        if interval is not None and mean:
            ends = (interval[0] * bits / mean, interval[1] * bits / mean)
        yield (
            "bits_per_byte",
            Figure(value=bits, interval=ends, unit="bits/byte", protocol=protocol),
        )
    for name, value in tree.get("baselines", {}).items():
        # unigram_nats_per_token -> unigram
        short = name.partition("_")[0]
        yield short, Figure(value=value, unit=nats, protocol=protocol)
    entropy = tree.get(f"entropy_rate_nats_per_{unit}")
    if entropy is not None:
        yield "entropy_rate", Figure(value=entropy, unit=nats, protocol=protocol)


def _target_figures(tree: Mapping[str, Any], protocol: str) -> Iterator[tuple[str, Figure]]:
    units = tree.get("units", {})
    for target, bound in tree["targets"].items():
        yield (
            target,
            Figure(
                value=bound["nats_per_sample"],
                interval=_pair(bound.get("interval")),
                unit="nats/sample",
                protocol=protocol,
            ),
        )
        for field, figures in bound.get("fields", {}).items():
            yield (
                f"{target}: {field}",
                Figure(
                    value=figures["nats_per_item"],
                    interval=_pair(figures.get("interval")),
                    unit=f"nats/{units.get(field, 'item')}",
                    protocol=protocol,
                ),
            )


def _pair(interval: Any) -> tuple[float, float] | None:
    """Return an interval as a tuple; JSON has only lists."""
    if interval is None:
        return None
    low, high = interval
    return low, high
