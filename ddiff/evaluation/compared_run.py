"""Evaluated run in the comparison of `ddiff compare`: its files, and its row of the table.

This module does not import torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddiff.checkpoint.atomic_folder import newest_state
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.generation_comparison import Generated
from ddiff.run_dir.files import (
    CHECKPOINTS,
    ENVIRONMENT,
    EVALUATION,
    GENERATION,
    METRICS,
    ORIGIN,
    SAMPLES,
    SAMPLING,
    RunRecord,
    evaluation_record,
    generation_record,
    read_json,
    read_json_lines,
    require_run_dir,
)
from ddiff.run_dir.identity import Difference, check_recorded, raise_differences

if TYPE_CHECKING:
    from ddiff.run_dir.generation_record import GenerationRecord

PROTOCOL = (
    "protocol",
    "unit",
    "length",
    "tokenizer",
    "data",
    "conditions",
    "window",
    "draws",
    "until",
)
_SOME_ROWS = re.compile(r", \d+ of (?P<all>\d+) rows$")
BOUND_ONLY = ("window", "draws", "until")  # an exact likelihood is not integrated over time
OWN_KEYS = ("name", "run_dir", "seed")  # keys in which the seeds of one recipe may differ


@dataclass(frozen=True)
class Row:
    """Row of the table: one run, or the mean of runs that differ only in the seed.

    Attributes:
        process: kind of the process, followed by the kind of the time rule unless it is "flat".
        tokens_seen: number of tokens processed in training; None for an imported run.
        bound: "NELBO", or "NLL" if the likelihood is exact.
        nats: the bound in nats per unit, which is a token or a symbol.
        interval: 95 % confidence interval of the bound: over documents for one run, over seeds for
            the mean of several runs. None for one run with one document.
        sample_entropy: mean over the samples of the entropy, in nats, of the token frequencies
            within one sample.
        nfe: mean number of network evaluations per sample.
        train_seconds: training time in seconds per 1000 training tokens; None for an imported run.
        sample_seconds: sampling time in seconds per 1000 sampled tokens, with the batch size of the
            recipe.
        generated: figures of the samples that `ddiff eval --generate` drew; None without them.
    """

    run: str
    process: str
    seeds: int
    parameters: int
    tokens_seen: float | None
    bound: str
    nats: float
    interval: tuple[float, float] | None
    bits_per_byte: float | None
    sampler: str
    sample_entropy: float | None
    nfe: float | None
    train_seconds: float | None
    sample_seconds: float | None
    generated: Generated | None = None


def describe_rows(fingerprint: str, read: int, count: int) -> str:
    """Return the setting `data` of an evaluation that read some or all of `count` rows."""
    return fingerprint if read == count else f"{fingerprint}, {read} of {count} rows"


def count_common_rows(settings: Sequence[str]) -> str | None:
    """Return the number of all rows if settings of `describe_rows` differ only in the rows read."""
    if len({_SOME_ROWS.sub("", each) for each in settings}) > 1:
        return None
    return next(found["all"] for each in settings if (found := _SOME_ROWS.search(each)))


def select_settings(settings: Mapping[str, Any], bound: str) -> dict[str, Any]:
    """Return the settings of an evaluation that must be equal in all compared runs.

    A setting is None if it is unknown or does not matter. An exact likelihood (`bound` "NLL") needs
    no random times, so `window`, `draws` and `until` do not matter. With `until`, the number of
    draws depends on the model.
    """
    selected = {}
    for name in PROTOCOL:
        applies = not (bound == "NLL" and name in BOUND_ONLY)
        selected[name] = settings.get(name) if applies else None
    if selected["until"] is not None:
        selected["draws"] = None
    return selected


class ComparedRun:
    """Contents of the files in one run directory.

    Raises CheckpointError if a file is missing or damaged, or if the files do not belong together.
    """

    def __init__(self, place: Path, generation: bool = True) -> None:
        self.place = place
        require_run_dir(place)
        self.record = RunRecord.read(place)
        if "fields" in self.record.recipe:
            raise ArgumentError(
                f"ddiff compare: {place} is a run of several fields, and only runs of text can be "
                "compared in one table. Read its bounds with intervals in evaluation.json, or "
                f"print them with `ddiff eval {place}`."
            )
        self.recipe = self.record.recipe
        # An import has neither a training nor the samples that follow a training.
        self.is_imported = (place / ORIGIN).exists()
        self._check_present(ENVIRONMENT)
        self.evaluation = self._read(EVALUATION, read_json)
        self.evaluated = evaluation_record(self.evaluation, place / EVALUATION)
        self.figures = self.evaluated.figures
        if self.is_imported:
            self.metrics = read_json_lines(place / METRICS)
            self.samples = read_json_lines(place / SAMPLES)
            self.sampling = read_json(place / SAMPLING)
        else:
            self.metrics = self._read(METRICS, read_json_lines)
            self.samples = self._read(SAMPLES, read_json_lines)
            self.sampling = self._read(SAMPLING, read_json)
            self._check_steps()
        self._check_checkpoint()
        self.generated = self._read_generation() if generation else None

    def _read_generation(self) -> GenerationRecord | None:
        """Return the figures of samples, or None if there are none.

        Raises CheckpointError if they are those of other weights than the likelihood.
        """
        path = self.place / GENERATION
        found = read_json(path)
        if not found:
            return None
        record = generation_record(found, path)
        was = record.fingerprints.get("weights")
        now = self.evaluated.fingerprints.get("weights")
        # the average and the trained weights of one step have different fingerprints
        is_other = (
            record.weights == self.evaluated.weights and None not in (was, now) and was != now
        )
        if is_other or record.step != self.evaluated.step:
            raise CheckpointError(
                f"{path} has the figures of samples of step {record.step}, and "
                f"{EVALUATION} those of other weights, of step {self.evaluated.step}. Repeat "
                f"`ddiff eval {self.place} --generate` with the options of the first time, or "
                "leave these figures out: ddiff compare --no-generation."
            )
        return record

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        self._check_present(name)
        return read(self.place / name)

    def _check_present(self, name: str) -> None:
        """Raise CheckpointError if the run has not written the file `name`."""
        if (self.place / name).exists():
            return
        if self.is_imported:
            raise CheckpointError(
                f"{self.place} is an import that has no {name}. Evaluate it: ddiff eval "
                f"{self.place}"
            )
        raise CheckpointError(
            f"{self.place} is not finished: {name} is missing. Repeat `ddiff run` with the "
            "recipe of the run, which resumes the run."
        )

    def _check_steps(self) -> None:
        """Raise CheckpointError unless all files describe the same training step."""
        steps = {
            "metrics.jsonl": self.metrics[-1]["step"] if self.metrics else 0,
            "evaluation.json": self.evaluation["step"],
            "samples.jsonl": self.samples[-1]["step"] if self.samples else 0,
            "sampling.json": self.sampling["step"],
        }
        if len(set(steps.values())) > 1:
            found = ", ".join(f"{name} of step {step}" for name, step in steps.items())
            raise CheckpointError(
                f"{self.place} is not finished: its files are of different steps ({found}). Repeat "
                "`ddiff run` with the recipe of the run, which brings all files to the last step."
            )

    def _check_checkpoint(self) -> None:
        """Raise CheckpointError if the run's results do not belong to its newest checkpoint.

        This is the case if the checkpoint records another recipe or another tokenizer.
        """
        state = newest_state(str(self.place / CHECKPOINTS))
        if state is None:
            return  # the weights were deleted; the results are still valid
        check_recorded(self.record, state)
        was = state.get("fingerprints", {}).get("tokenizer")
        now = self.evaluation["protocol"].get("tokenizer")
        if was is not None and now is not None and was != now:
            difference = Difference("tokenizer of evaluation.json", was, now)
            raise_differences(self.place, [difference], "Evaluate the run again: ddiff eval.")

    def protocol(self) -> dict[str, Any]:
        """Return the evaluation settings that must be equal in all compared runs."""
        bound = self.evaluation["bound"]
        settings = {
            **self.evaluation["protocol"],
            "unit": self.evaluation["unit"],
            "protocol": self.figures[bound.lower()].protocol,
        }
        return select_settings(settings, bound)

    def recipe_without_seed(self) -> str:
        """Return the recipe as JSON text, without its keys name, run_dir and seed."""
        shared = dict(self.recipe)
        for key in OWN_KEYS:
            shared.pop(key, None)
        return json.dumps(shared, sort_keys=True)

    def row(self) -> Row:
        """Return the table row of the run."""
        figures = self.figures
        tokens = sum(line["tokens"] for line in self.metrics)
        seconds = sum(line["seconds"] for line in self.metrics)
        sampled = max(self.sampling.get("tokens", 0), 1)
        sampling_seconds = self.sampling.get("seconds")
        bound = self.evaluation["bound"]
        nats = figures[bound.lower()]
        bits = figures.get("bits_per_byte")
        entropies = [_entropy(sample["ids"]) for sample in self.samples]
        return Row(
            run=self.recipe["name"],
            process=_describe_process(self.recipe),
            seeds=1,
            parameters=self.record.environment["parameters"],
            tokens_seen=None if self.is_imported else tokens,
            bound=bound,
            nats=nats.value,
            interval=nats.interval,
            bits_per_byte=bits.value if bits else None,
            sampler=self._describe_sampler(),
            generated=None if self.generated is None else Generated.of(self.generated),
            sample_entropy=_mean(entropies),
            nfe=_mean([sample["nfe"] for sample in self.samples]),
            train_seconds=None if self.is_imported else 1000 * seconds / max(tokens, 1),
            sample_seconds=None if sampling_seconds is None else 1000 * sampling_seconds / sampled,
        )

    def _describe_sampler(self) -> str:
        """Return the kind of the sampler and its number of steps, such as "KIND, 64".

        If the number of steps is random, it is replaced by "–".
        """
        keys = self.recipe["sample"]
        steps = self.sampling.get("steps", keys["steps"])  # earlier versions did not write steps
        return f"{keys['sampler']['kind']}, {'–' if steps is None else steps}"


def _describe_process(recipe: Mapping[str, Any]) -> str:
    """Return the kind of the process of a recipe, followed by the kind of its time rule.

    The two kinds are separated by a comma. The kind "flat" of a time rule is omitted. If the recipe
    has no process, the result is the kind of the objective.
    """
    objective = recipe["objective"]
    if "process" not in recipe:
        return objective["kind"]
    kind = recipe["process"]["kind"]
    times = objective.get("times", {}).get("kind", "flat")
    return kind if times == "flat" else f"{kind}, {times}"


def _entropy(ids: Sequence[int]) -> float:
    """Return the entropy of the token frequencies of one sample, in nats."""
    entropy = 0.0
    for count in Counter(ids).values():
        share = count / len(ids)
        entropy -= share * math.log(share)
    return entropy


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
