"""Versioned schema of `generation.json`, the figures of generated samples.

A record contains every figure of samples and of held-out rows with its interval, unit and protocol;
the settings of the sampler; fingerprints of the weights, the tokenizer, the vocabulary, the
held-out rows and the judge; and components with their plugins and versions. Only `provenance`
differs between two equal runs.

A perplexity cannot be recorded without the entropy of the same samples, because a judge finds
repeated text probable.

Version 1 had no figures, fingerprints, components and provenance, and the duration was in
`sampling`. `GenerationRecord.from_tree` converts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddiff.run_dir.evaluation_record import Figure, Provenance, Record, dump_figures

GENERATION_VERSION = 2
"""Newest version of generation.json, which this version of ddiff writes."""

HELD_OUT = "held_out: "
"""Beginning of the names of figures of held-out rows."""

PERPLEXITY = "perplexity"
"""Beginning of the unit of every perplexity."""

PART_UNITS = {"distinct": "share of n-grams", "repetition": "share of n-grams"}
MEANS = {
    "entropy_nats": ("entropy", "nats/sample"),
    "self_bleu": ("self_bleu", "BLEU-4"),
    "known_words": ("known_words", "share of words"),
}
"""Key of the mean of a number over samples -> name and unit of its figure."""


class _Part(BaseModel):
    """JSON object that keeps its unknown keys."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Mean(_Part):
    """Mean of a number over samples."""

    value: float = Field(strict=True, allow_inf_nan=False)
    interval: tuple[float, float] | None = None


class Perplexity(_Part):
    """Perplexity of samples under a judge, with the entropy of the same samples.

    Attributes:
        corpus: exp(sum of nats / sum of scored tokens).
        entropy_nats: unigram entropy of a sample, averaged over the samples.
    """

    corpus: float = Field(strict=True, allow_inf_nan=False)
    entropy_nats: Mean


class Judged(_Part):
    """Findings of a judge.

    Attributes:
        protocol: settings of the judge, on which the perplexities depend.
        samples: perplexity of the samples.
        held_out: perplexity of the held-out rows.
    """

    protocol: dict[str, Any]
    samples: Perplexity
    held_out: Perplexity | None = None


class Sampling(_Part):
    """Settings of the sampler, on which the samples depend.

    Attributes:
        sampler: kind and keys of the sampler, such as its temperature.
        steps: number of steps; None if it is random, or if the sampler has none.
        nfe: mean number of network evaluations per sample.
        count: number of samples.
        length: number of tokens that the sampler draws for a sample.
        seed: seed of the random generator.
        dtype: dtype of the weights.
        precision: dtype of matrix products.
    """

    sampler: dict[str, Any]
    steps: int | None
    nfe: float
    count: int
    length: int
    seed: int
    dtype: str
    precision: str


class GenerationRecord(Record):
    """Content of generation.json.

    The key `mauve` has MAUVE with the features of an encoder of texts. MAUVE with the features of
    the judge is in `judge`.

    Attributes:
        run: name of the recipe.
        unit: "token" or "symbol".
        sampling: settings of the sampler.
        samples: figures of the samples, as `ddiff.SampleFigures.to_dict` returns them.
        held_out: the same figures of held-out rows.
        findings: what the judge of the recipe finds on the samples; None without [judge].
        judge: findings of the judge; None without a judge.
        self_correction: self-correction accuracy and its curve; None if it is not defined.
    """

    newest_version = GENERATION_VERSION

    run: str
    unit: str
    sampling: Sampling
    samples: dict[str, Any]
    held_out: dict[str, Any]
    findings: list[dict[str, Any]] | None = None
    judge: Judged | None = None
    self_correction: dict[str, Any] | None = None

    @classmethod
    def convert(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        if tree.get("schema_version", 1) != 1:
            return tree
        sampling = dict(tree["sampling"])
        provenance = Provenance(
            seconds=sampling.pop("seconds", None), hardware={"device": sampling.pop("device", None)}
        )
        converted = {"schema_version": 1, **tree, "sampling": sampling}
        return {
            **converted,
            "figures": dump_figures(make_generation_figures(converted)),
            "protocol": make_generation_protocol(converted),
            "provenance": provenance,
        }

    @model_validator(mode="after")
    def _check_perplexities(self) -> GenerationRecord:
        for name, figure in self.figures.items():
            if not figure.unit.startswith(PERPLEXITY):
                continue
            entropy = f"{HELD_OUT}entropy" if name.startswith(HELD_OUT) else "entropy"
            if entropy not in self.figures:
                raise ValueError(
                    f'the figure "{name}" is a perplexity, which has no meaning without the '
                    f'entropy of the same samples: the figure "{entropy}" is missing'
                )
        return self


def make_generation_protocol(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must be equal to compare the figures of two records.

    The sampler, its steps, temperature and seed are not among them: they are properties of the
    samples, not of the evaluation. `tree` is the content of generation.json without figures.
    """
    sampling = tree["sampling"]
    protocol = {
        "count": sampling["count"],
        "length": sampling["length"],
        "unit": tree["unit"],
        "tokenizer": tree["tokenizer"],
        "data": tree["held_out"].get("rows"),
    }
    judge = tree.get("judge")
    if judge is not None:
        protocol["judge"] = dict(judge["protocol"])
    return protocol


def make_generation_figures(tree: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of samples and of held-out rows by name.

    `tree` is the content of generation.json without figures. Names of figures of held-out rows
    begin with `HELD_OUT`.
    """
    sampling = tree["sampling"]
    own = f"{sampling['count']} samples of {sampling['length']} {tree['unit']}s"
    rows = f"{tree['held_out'].get('count', 0)} rows of held-out text"
    found = dict(_part_figures(tree["samples"], own))
    found["nfe"] = Figure(value=sampling["nfe"], unit="network evaluations/sample", protocol=own)
    correction = tree.get("self_correction")
    if correction is not None:
        found["self_correction_accuracy"] = _mean_figure(
            correction["accuracy"], f"share of {tree['unit']}s", own
        )
    for name, figure in _part_figures(tree["held_out"], rows):
        found[HELD_OUT + name] = figure
    for finding in tree.get("findings") or ():
        found[f"judged: {finding['name']}"] = _mean_figure(finding, "finding", own)
    judge = tree.get("judge")
    if judge is not None:
        rule = _describe_judge(judge["protocol"])
        found |= _perplexity_figures(judge["samples"], f"{own}, {rule}")
        if judge.get("held_out") is not None:
            for name, figure in _perplexity_figures(judge["held_out"], f"{rows}, {rule}").items():
                found[HELD_OUT + name] = figure
        found |= _mauve_figures(judge.get("mauve"), f"{own}, {rows}, {rule}")
    if tree.get("mauve") is not None:
        features = tree["mauve"]["features"]
        rule = f"features of {features['encoder']} (fingerprint {features['fingerprint']})"
        found |= _mauve_figures(tree["mauve"], f"{own}, {rows}, {rule}")
    return found


def _mauve_figures(found: Mapping[str, Any] | None, protocol: str) -> dict[str, Figure]:
    """Return MAUVE of the samples, and of other held-out rows if it is known."""
    if found is None:
        return {}
    figures = {"mauve": Figure(value=found["value"], unit="MAUVE", protocol=protocol)}
    best = found.get("held_out_value")
    if best is not None:
        figures[f"{HELD_OUT}mauve"] = Figure(value=best, unit="MAUVE", protocol=protocol)
    return figures


def _part_figures(part: Mapping[str, Any], protocol: str) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of samples, or of rows, that need no judge."""
    for key, (name, unit) in MEANS.items():
        if part.get(key) is not None:
            yield name, _mean_figure(part[key], unit, protocol)
    if "pooled_entropy_nats" in part:
        yield (
            "entropy_pooled",
            Figure(value=part["pooled_entropy_nats"], unit="nats", protocol=protocol),
        )
    for key, unit in PART_UNITS.items():
        for n, value in part.get(key, {}).items():
            if isinstance(value, Mapping):
                yield f"{key}_{n}", _mean_figure(value, unit, protocol)
            else:
                yield f"{key}_{n}", Figure(value=value, unit=unit, protocol=protocol)


def _perplexity_figures(part: Mapping[str, Any], protocol: str) -> dict[str, Figure]:
    unit = f"{PERPLEXITY} per token of the judge"
    found = {
        "perplexity": Figure(
            value=part["corpus"],
            interval=part.get("corpus_interval"),
            unit=unit,
            protocol=protocol,
        )
    }
    if part.get("per_sample") is not None:
        mean = _mean_figure(part["per_sample"], f"{unit}, mean over samples", protocol)
        found["perplexity_mean_of_samples"] = mean
    return found


def _mean_figure(found: Mapping[str, Any], unit: str, protocol: str) -> Figure:
    return Figure(
        value=found["value"], interval=found.get("interval"), unit=unit, protocol=protocol
    )


def _describe_judge(protocol: Mapping[str, Any]) -> str:
    """Return the judge and its rule for tokens as text."""
    tokens = "texts tokenized again" if protocol.get("retokenized", True) else "ids of the samples"
    return f"judge {protocol.get('judge', 'without a name')}, {tokens}"
