"""Figures of generated samples in the table of `ddiff compare`, from generation.json.

Figures are put in one column only if the samples were evaluated alike. The settings in
`make_generation_protocol` must be equal; those of the sampler may differ, and are shown.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddiff.errors import ArgumentError
from ddiff.evaluation.intervals import student95

if TYPE_CHECKING:
    from ddiff.run_dir.evaluation_record import Figure
    from ddiff.run_dir.generation_record import GenerationRecord

JUDGE_NAMES = ("judge", "revision", "step", "weights")
"""Keys of the judge's protocol that name the judge; a fingerprint of its weights replaces them."""

SHOWN_SAMPLING = ("sampler.kind", "sampler.temperature", "steps", "nfe")
"""Settings of the sampler that have a column."""

LIKELIHOOD_SETTINGS = ("length", "unit", "tokenizer", "data")
"""Settings that the evaluation of the likelihood has too."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Value:
    """Value of a figure, with its 95 % confidence interval if it is known."""

    value: float
    interval: Interval | None = None

    def __format__(self, form: str) -> str:
        text = format(self.value, form)
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} ± {format((high - low) / 2, form)}"


@dataclass(frozen=True)
class Generated:
    """Figures of the samples of one run, or their means over runs that differ in the seed.

    Attributes:
        sampler: kind of the sampler, its steps and its temperature.
        nfe: mean number of network evaluations per sample.
        entropy: unigram entropy of a sample in nats, averaged over the samples.
        perplexity: perplexity under the judge; None without a judge.
        distinct_2: different bigrams / bigrams; None if the samples are too short.
        known_words: share of words that occur in held-out text; None for symbols.
    """

    sampler: str
    nfe: float
    entropy: Value
    perplexity: Value | None
    distinct_2: Value | None
    known_words: Value | None

    @classmethod
    def of(cls, record: GenerationRecord) -> Generated:
        figures = record.figures
        sampling = record.sampling
        parts = [str(sampling.sampler["kind"])]
        if sampling.steps is not None:
            parts.append(f"{sampling.steps} steps")
        if "temperature" in sampling.sampler:
            parts.append(f"temperature {sampling.sampler['temperature']:g}")
        return cls(
            sampler=", ".join(parts),
            nfe=sampling.nfe,
            entropy=_read(figures["entropy"]),
            perplexity=_read_optional(figures.get("perplexity")),
            distinct_2=_read_optional(figures.get("distinct_2")),
            known_words=_read_optional(figures.get("known_words")),
        )

    @classmethod
    def mean(cls, found: Sequence[Generated | None]) -> Generated | None:
        """Return the means over runs that differ only in the seed.

        Returns None if a run has no figures, or if the runs used different samplers. Intervals are
        over the runs. The perplexity is exp(mean of ln perplexity).
        """
        known = [one for one in found if one is not None]
        if len(known) < len(found) or len({one.sampler for one in known}) > 1:
            return None
        if len(known) == 1:
            return known[0]
        entropy = _average([one.entropy for one in known])
        assert entropy is not None  # every run has an entropy
        return cls(
            sampler=known[0].sampler,
            nfe=statistics.fmean(one.nfe for one in known),
            entropy=entropy,
            perplexity=_average([one.perplexity for one in known], in_logarithm=True),
            distinct_2=_average([one.distinct_2 for one in known]),
            known_words=_average([one.known_words for one in known]),
        )

    def describe_perplexity(self) -> str:
        """Return the perplexity together with the entropy of the same samples."""
        if self.perplexity is None:
            return "–"
        text = f"{self.perplexity.value:.4g}"
        if self.perplexity.interval is not None:
            low, high = self.perplexity.interval
            text += f" ({low:.4g} to {high:.4g})"
        return f"{text} at entropy {self.entropy.value:.3f}"


def _read(figure: Figure) -> Value:
    return Value(figure.value, figure.interval)


def _read_optional(figure: Figure | None) -> Value | None:
    return None if figure is None else _read(figure)


def _average(values: Sequence[Value | None], *, in_logarithm: bool = False) -> Value | None:
    """Return the mean of values with its interval (Student); None if a value is None."""
    numbers = [value.value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    if in_logarithm:
        numbers = [math.log(number) for number in numbers]
    mean = statistics.fmean(numbers)
    standard_error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    half = student95(len(numbers) - 1) * standard_error
    ends = (mean - half, mean + half)
    if in_logarithm:
        return Value(math.exp(mean), (math.exp(ends[0]), math.exp(ends[1])))
    return Value(mean, ends)


# ---------------------------------------------------------------------- settings


def find_common_generation(records: Mapping[Path, GenerationRecord]) -> dict[str, Any] | None:
    """Return the settings with which the samples of all runs were evaluated.

    `records`: directory of each run -> its record, for the runs that have one. Returns None if
    there is none. Raises ArgumentError with the list of settings that differ.
    """
    if not records:
        return None
    protocols = {place: _flatten(record.protocol) for place, record in records.items()}
    common: dict[str, Any] = {}
    for protocol in protocols.values():
        if "judge.judge" in protocol:
            common["judge"] = protocol["judge.judge"]
    _drop_names_of_known_judges(protocols)
    differing: list[str] = []
    for name in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        # a run without a judge has no perplexity, so it does not differ in that column
        found = {place: protocol[name] for place, protocol in protocols.items() if name in protocol}
        common[name] = next(iter(found.values()))
        if len({json.dumps(value) for value in found.values()}) > 1:
            values = [f"{value} in {place}" for place, value in found.items()]
            differing.append(f"  {name}: {', '.join(values)}")
    common.pop("judge.judge", None)  # already there as "judge"
    if differing:
        lines = "\n".join(differing)
        raise ArgumentError(
            "ddiff compare: the samples of these runs were not evaluated alike, so their figures "
            f"are not comparable. Different settings:\n{lines}\n"
            f"Evaluate the samples of every run alike: {_describe_command(records)}. Or leave the "
            "figures of samples out: ddiff compare --no-generation."
        )
    return common


def _flatten(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known settings, those of the judge by keys such as "judge.window"."""
    flat: dict[str, Any] = {}
    for key, value in protocol.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items() if inner is not None}
        elif value is not None:
            flat[key] = value
    return flat


def _drop_names_of_known_judges(protocols: Mapping[Path, dict[str, Any]]) -> None:
    """Drop the names of the judges if the weights of all judges have a fingerprint.

    Two judges with equal weights count as one, even if their directories differ.
    """
    judged = [protocol for protocol in protocols.values() if "judge.judge" in protocol]
    if not all("judge.model" in protocol for protocol in judged):
        return
    for protocol in judged:
        for name in JUDGE_NAMES:
            protocol.pop(f"judge.{name}", None)


def _describe_command(records: Mapping[Path, GenerationRecord]) -> str:
    """Return the command that evaluates samples as the first of the runs with a judge."""
    chosen = next((one for one in records.values() if one.judge), next(iter(records.values())))
    command = f"ddiff eval RUN_DIR --generate --count {chosen.sampling.count}"
    judge = chosen.protocol.get("judge")
    if judge is not None:
        command += f" --judge {judge.get('judge')}"
        if not judge.get("retokenized", True):
            command += " --no-retokenize"
    return command


def describe_generation_settings(common: Mapping[str, Any]) -> str:
    """Return a sentence on the settings that are equal for all samples.

    Settings that are also those of the likelihood are left out.
    """
    own = []
    judge = []
    for name, value in common.items():
        if name.startswith("judge"):
            judge.append(f"{name.removeprefix('judge.')} {value}")
        elif name not in LIKELIHOOD_SETTINGS:
            own.append(f"{name} {value}")
    parts = [", ".join(own)]
    if judge:
        parts.append(", ".join(judge))
    return f"Samples evaluated alike: {'; '.join(parts)}."


def note_sampling_differences(records: Mapping[Path, GenerationRecord]) -> list[str]:
    """Return a sentence per setting of the sampler that differs and has no column."""
    settings = {}
    for place, record in records.items():
        flat = _flatten(record.sampling.model_dump())
        settings[place] = {"weights": record.weights, **flat}
    notes = []
    for name in dict.fromkeys(key for flat in settings.values() for key in flat):
        found = {}
        kinds = {flat["sampler.kind"] for flat in settings.values() if name in flat}
        for place, flat in settings.items():
            # another kind of sampler does not have the keys of this one
            if not name.startswith("sampler.") or flat["sampler.kind"] in kinds:
                found[place] = flat.get(name, "none")
        distinct = {json.dumps(value) for value in found.values()}
        if name in SHOWN_SAMPLING or len(distinct) < 2:
            continue
        values = [f"{value} in {place}" for place, value in found.items()]
        notes.append(f"Samples drawn with different {name}: {', '.join(values)}.")
    return notes
