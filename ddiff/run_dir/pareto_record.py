"""Versioned schema of `pareto.json`: judged samples of a run at several settings of its sampler.

A point has the figures of the samples of one setting: a sampler with all its keys and a number of
steps. Everything else that changes the figures is in `protocol` and `fingerprints`, and is equal
for all points of a file. Every perplexity stands next to the entropy of the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ddiff.run_dir.command_record import CommandRecord, Estimate, Finite, RecordPart
from ddiff.run_dir.evaluation_record import Provenance

SCHEMA_VERSION = 1
"""Newest version of the schema, which this version of ddiff writes."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Perplexity(Estimate):
    """Perplexity of samples under the judge."""

    value: Positive


class JudgedFigures(RecordPart):
    """Figures of samples, or of rows of held-out text.

    Attributes:
        perplexity: perplexity under the judge.
        entropy: unigram entropy of a sample in nats, averaged over samples.
        distinct_2: different pairs of neighbouring words, as a fraction of all pairs; None if all
            samples are too short.
        known_words: fraction of the words that occur in the held-out text; None for texts without
            words, and for the held-out text itself.
        scored: number of tokens that the judge scored.
    """

    perplexity: Perplexity
    entropy: Estimate
    distinct_2: Finite | None = None
    known_words: Estimate | None = None
    scored: int


class SweepPoint(JudgedFigures):
    """Figures of the samples of one setting.

    Attributes:
        sampler: kind and all keys of the sampler, with its temperature.
        steps: number of sampling steps; None if the sampler does not take this setting.
        temperature: temperature of the sampler; None if the sampler has none.
        nfe: network evaluations per sample.
        seconds: duration of sampling and judging.
    """

    sampler: dict[str, Any]
    steps: int | None
    temperature: Finite | None
    nfe: Positive
    seconds: Finite

    @property
    def kind(self) -> str:
        return str(self.sampler["kind"])

    @property
    def key(self) -> str:
        """Text that is equal for two points with equal settings."""
        return make_key(self.sampler, self.steps)


def make_key(sampler: Mapping[str, Any], steps: int | None) -> str:
    """Return the key of a point from the kind and keys of its sampler, and its steps."""
    return json.dumps([sampler, steps], sort_keys=True)


class HeldOutText(JudgedFigures):
    """Figures of rows of held-out text, the reference point.

    Attributes:
        rows: number of rows.
    """

    rows: int


class ParetoRecord(CommandRecord):
    """Content of pareto.json.

    Attributes:
        run: name of the run.
        step: training step of the weights.
        weights: "ema" for the exponential moving average of the weights, "trained" for the weights
            as they were trained.
        protocol: settings that are equal for all points: number, length and seed of the samples,
            the judge with the fingerprint of its weights (`model`), and others.
        fingerprints: fingerprints of the weights, the tokenizer, the vocabulary and the validation
            rows of the run, by name.
        components: recipe key of each component -> its name, plugin and version.
        provenance: command, hardware and duration of the last command that added points.
    """

    newest_version = SCHEMA_VERSION
    command = "ddiff pareto"

    schema_version: int = SCHEMA_VERSION
    run: str
    step: int
    weights: Literal["ema", "trained"]
    protocol: dict[str, Any]
    fingerprints: dict[str, str]
    components: dict[str, str] = Field(default_factory=dict)
    held_out: HeldOutText
    points: list[SweepPoint]
    provenance: Provenance = Provenance()


def read_pareto(path: Path) -> ParetoRecord | None:
    """Read a pareto.json. Returns None if the file does not exist.

    Raises CheckpointError if the file is damaged, or if a newer version of ddiff wrote it.
    """
    if not path.exists():
        return None
    return ParetoRecord.read(path)


def find_differences(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ in two protocols, with both values, by name.

    The settings of the judge have names such as "judge.window". Its name is a path, and does not
    count if the fingerprints of its weights are known.
    """
    ours = _flatten(first)
    theirs = _flatten(second)
    found = {}
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            found[name] = (ours.get(name), theirs.get(name))
    return found


def _flatten(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a protocol with those of the judge."""
    found = {name: value for name, value in protocol.items() if name != "judge"}
    judge = protocol.get("judge", {})
    for name, value in judge.items():
        if name != "judge" or "model" not in judge:
            found[f"judge.{name}"] = value
    return found
