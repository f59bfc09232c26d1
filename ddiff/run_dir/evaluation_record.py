"""Versioned schema of `evaluation.json`.

A record contains figures, each with its interval, unit and protocol, and everything that is needed
to repeat or to check them: settings of the evaluation, fingerprints of weights, tokenizer,
vocabulary and data, plugins with versions, hardware, time and command. In addition, the record of a
text run contains the terms and parts of the bound by name, and the record of a run of several
fields contains the bounds of each target.

Files without the key `schema_version` are of version 1, which had no figures and no provenance.
`EvaluationRecord.from_tree` converts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 2
"""Newest version of the schema, which this version of ddiff writes."""

OWN_DATA = "validation"
"""Protocol of figures on the validation data of the run."""

LARGEST_EXPONENT = 700.0  # exp(700) is still a finite float64


class NewerSchemaError(ValueError):
    """Error about a record whose version is newer than `SCHEMA_VERSION`."""


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


class EvaluationRecord(BaseModel):
    """Content of evaluation.json. Keys that are not listed here are kept.

    Attributes:
        step: training step of the weights.
        weights: "ema" for the exponential moving average of the weights, "trained" for the weights
            as they were trained.
        figures: name of a figure -> its value.
        protocol: settings of the evaluation.
        fingerprints: fingerprints of weights, tokenizer, vocabulary and data, by name.
        components: recipe key of each component -> its name, plugin and version.
        sampler: settings of the sampler; None if no samples were drawn.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    schema_version: int
    step: int = Field(strict=True)
    weights: Literal["ema", "trained"]
    figures: dict[str, Figure]
    protocol: dict[str, Any]
    fingerprints: dict[str, str] = {}
    components: dict[str, str] = {}
    sampler: dict[str, Any] | None = None
    provenance: Provenance = Provenance()

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        if "schema_version" in tree:
            return tree
        figures = {}
        for name, figure in make_figures(tree).items():
            figures[name] = figure.model_dump()
        return {"schema_version": 1, **tree, "figures": figures}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> EvaluationRecord:
        """Check and convert the content of an evaluation.json of any version.

        Raises NewerSchemaError if the version is newer than `SCHEMA_VERSION`, and ValueError, which
        names the key, if a value is missing or invalid.
        """
        check_version(tree)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f'the key "{key}" is invalid: {first["msg"]}') from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"a figure of the evaluation is missing ({error})") from error


def check_version(tree: Mapping[str, Any]) -> None:
    """Raise NewerSchemaError if the version of a record is newer than `SCHEMA_VERSION`."""
    version = tree.get("schema_version", 1)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"it has schema version {version}, and this version of ddiff reads versions up to "
            f"{SCHEMA_VERSION}"
        )


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
