"""Comparison of finished runs in one table: `ddiff compare RUN RUN ...`.

The comparison reads only files in run directories and does not import torch. Runs are compared only
if all were evaluated on the same validation tokens with the same length, window and draws.
Otherwise an error lists the differences.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ddiff.checkpoint.atomic_folder import newest_state
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.intervals import student95
from ddiff.run_dir.destination import check_destination, write_text
from ddiff.run_dir.files import (
    CHECKPOINTS,
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    RECIPE,
    SAMPLES,
    SAMPLING,
    RunRecord,
    evaluation_record,
    read_json,
    read_json_lines,
)
from ddiff.run_dir.identity import Difference, check_recorded, raise_differences

PROTOCOL = ("unit", "length", "tokenizer", "data", "conditions", "window", "draws", "until")
BOUND_ONLY = ("window", "draws", "until")  # an exact likelihood is not integrated over time
OWN_KEYS = ("name", "run_dir", "seed")  # keys in which the seeds of one recipe may differ


@dataclass(frozen=True)
class Row:
    """Row of the table: one run, or the mean of runs that differ only in the seed.

    Attributes:
        process: kind of the process, followed by the kind of the time rule unless it is "flat".
        tokens_seen: number of tokens processed in training.
        bound: "NELBO", or "NLL" if the likelihood is exact.
        nats: the bound in nats per unit, which is a token or a symbol.
        interval: 95 % confidence interval of the bound: over documents for one run, over seeds for
            the mean of several runs. None for one run with one document.
        sample_entropy: mean over the samples of the entropy, in nats, of the token frequencies
            within one sample.
        nfe: mean number of network evaluations per sample.
        train_seconds: training time in seconds per 1000 training tokens.
        sample_seconds: sampling time in seconds per 1000 sampled tokens, with the batch size of the
            recipe.
    """

    run: str
    process: str
    seeds: int
    parameters: int
    tokens_seen: float
    bound: str
    nats: float
    interval: tuple[float, float] | None
    bits_per_byte: float | None
    sampler: str
    sample_entropy: float | None
    nfe: float | None
    train_seconds: float
    sample_seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """Table of runs with the same evaluation settings, and baselines on the same tokens.

    Attributes:
        protocol: evaluation settings and numbers of tokens and documents.
        baselines: name of each baseline -> nats per unit.
        rows: rows of the table.
        notes: sentences that explain the table.
    """

    protocol: Mapping[str, Any]
    baselines: Mapping[str, float]
    rows: Sequence[Row]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles and the cells of the table as text.

        Returns:
            - the titles of the columns,
            - a list of cells for each row.
        """
        columns = dict(COLUMNS)
        # leave out a column of ones
        if all(row.seeds == 1 for row in self.rows):
            del columns["seeds"]
        unit = self.protocol["unit"]
        titles = [title.format(unit=unit) for title in columns]
        cells = []
        for row in self.rows:
            cells.append([cell(row) for cell in columns.values()])
        return titles, cells

    def to_markdown(self, command: str) -> str:
        """Return the table and the remarks as Markdown, after the given command."""
        titles, cells = self.columns()
        lines = [titles, ["---"] * len(titles), *cells]
        table = "\n".join(_markdown_row(line) for line in lines)
        notes = "\n".join(f"- {note}" for note in self.remarks())
        return f"`{command}`\n\n{table}\n\n{notes}\n"

    def remarks(self) -> list[str]:
        """Return sentences on the evaluation settings and the baselines, followed by the notes."""
        protocol = self.protocol
        unit = protocol["unit"]
        settings = [
            f"{name} {protocol[name]}" for name in PROTOCOL if protocol.get(name) is not None
        ]
        baselines = [f"{name} {value:.4f}" for name, value in self.baselines.items()]
        return [
            f"Evaluated alike: {', '.join(settings)}; {protocol[f'{unit}s']:,} {unit}s in "
            f"{protocol['documents']} documents.",
            f"Baselines, nats/{unit} on the same {unit}s: {', '.join(baselines)}.",
            *self.notes,
        ]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _bound_cell(row: Row) -> str:
    if not row.interval:
        return f"{row.nats:.4f}"
    low, high = row.interval
    return f"{row.nats:.4f} ± {(high - low) / 2:.4f}"


def _optional(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "process": lambda row: row.process,
    "seeds": lambda row: str(row.seeds),
    "parameters": lambda row: f"{row.parameters:,}",
    "tokens seen": lambda row: f"{row.tokens_seen:,.0f}",
    "bound": lambda row: row.bound,
    "nats/{unit}": _bound_cell,
    "bits/byte": lambda row: _optional("{:.4f}", row.bits_per_byte),
    "sampler": lambda row: row.sampler,
    "sample entropy, nats": lambda row: _optional("{:.3f}", row.sample_entropy),
    "NFE": lambda row: _optional("{:.1f}", row.nfe),
    "train s/1k": lambda row: _optional("{:.3f}", row.train_seconds),
    "sample s/1k": lambda row: _optional("{:.3f}", row.sample_seconds),
}


def compare(run_dirs: Sequence[str | Path], *, group_seeds: bool = False) -> Comparison:
    """Compare finished runs, given by their directories.

    If `group_seeds` is True, runs that differ only in the seed are averaged to one row. Raises
    CheckpointError if a run is not finished or one of its files is damaged, and ArgumentError if
    the evaluation settings of the runs differ.
    """
    if not run_dirs:
        raise ArgumentError("ddiff compare: give at least one run directory, such as runs/<name>.")
    reports = [_Report(Path(run_dir)) for run_dir in run_dirs]
    counts = Counter(str(report.place) for report in reports)
    for place, count in counts.items():
        if count > 1:
            raise ArgumentError(f"ddiff compare: {place} was given twice. Give each run once.")
    protocol = _common_protocol(reports)
    first = reports[0].evaluation
    for name in (f"{first['unit']}s", "documents"):
        protocol[name] = first[name]
    baselines = {}
    for name, value in first["baselines"].items():
        baselines[name.split("_")[0]] = value  # unigram_nats_per_token -> unigram
    rows = _make_rows(reports, group_seeds)
    return Comparison(protocol, baselines, rows, _notes(reports))


def _make_rows(reports: Sequence[_Report], group_seeds: bool) -> list[Row]:
    groups: dict[str, list[_Report]] = {}
    for report in reports:
        key = report.recipe_without_seed() if group_seeds else str(report.place)
        groups.setdefault(key, []).append(report)
    rows = [_average_seeds(group) for group in groups.values()]
    if len({row.run for row in rows}) == len(rows):
        return rows
    # two recipes have the same name: use the directories as names of the rows
    named = []
    for row, group in zip(rows, groups.values()):
        places = ", ".join(str(report.place) for report in group)
        named.append(replace(row, run=places))
    return named


def write_comparison(
    comparison: Comparison,
    directory: str | Path,
    command: str,
) -> list[Path]:
    """Write compare.json and compare.md to a directory. Return both paths.

    `command` is the shell command, which is included in both files. Raises ArgumentError if the
    directory is not writable, or if an existing file with one of these names was not written by
    `ddiff compare`.
    """
    tree = {"command": command, **comparison.to_dict()}
    texts = {
        "compare.json": json.dumps(tree, indent=2) + "\n",
        "compare.md": comparison.to_markdown(command),
    }
    argument = "ddiff compare --out"
    folder = check_destination(directory, argument, folder=True)
    if folder.local is None:
        raise ArgumentError(f"{argument} must be a local folder; got {directory}.")
    paths = [Path(directory) / name for name in texts]
    # check both paths before the first file is written
    places = [check_destination(path, argument, owned=_is_comparison) for path in paths]
    for place, text in zip(places, texts.values()):
        write_text(place, text)
    return paths


def _is_comparison(file: IO[bytes]) -> bool:
    """Return True if the open file was written by `ddiff compare`."""
    start = file.read(200).lstrip()
    return start.startswith(b"`ddiff compare") or b'"command": "ddiff compare' in start


class _Report:
    """Contents of the files in one run directory.

    Raises CheckpointError if a file is missing or damaged, or if the files do not belong together.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        if not (place / RECIPE).is_file():
            raise CheckpointError(
                f"{place} is not a run directory: recipe.toml is missing. Give a directory "
                "that `ddiff run` wrote: runs/<name>."
            )
        self.record = RunRecord.read(place)
        if "fields" in self.record.recipe:
            raise ArgumentError(
                f"ddiff compare: {place} is a run of several fields, and only runs of text can be "
                "compared in one table. Read its bounds with intervals in evaluation.json, or "
                f"print them with `ddiff eval {place}`."
            )
        self.recipe = self.record.recipe
        self._check_present(ENVIRONMENT)
        self.evaluation = self._read(EVALUATION, read_json)
        self.figures = evaluation_record(self.evaluation, place / EVALUATION).figures
        self.metrics = self._read(METRICS, read_json_lines)
        self.samples = self._read(SAMPLES, read_json_lines)
        self.sampling = self._read(SAMPLING, read_json)
        self._check_steps()
        self._check_checkpoint()

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        self._check_present(name)
        return read(self.place / name)

    def _check_present(self, name: str) -> None:
        """Raise CheckpointError if the run has not written the file `name`."""
        if not (self.place / name).exists():
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
        """Return the evaluation settings that must be equal in all compared runs.

        `window`, `draws` and `until` are None for an exact likelihood, which needs no random times.
        With `until`, the number of draws depends on the model, and is not compared.
        """
        found = self.evaluation["protocol"] | {"unit": self.evaluation["unit"]}
        is_exact = self.evaluation["bound"] == "NLL"
        protocol = {}
        for name in PROTOCOL:
            applies = not (is_exact and name in BOUND_ONLY)
            protocol[name] = found.get(name) if applies else None
        if protocol["until"] is not None:
            protocol["draws"] = None
        return protocol

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
        sampled = max(self.sampling["tokens"], 1)
        bound = self.evaluation["bound"]
        nats = figures[bound.lower()]
        bits = figures.get("bits_per_byte")
        entropies = [_entropy(sample["ids"]) for sample in self.samples]
        return Row(
            run=self.recipe["name"],
            process=_describe_process(self.recipe),
            seeds=1,
            parameters=self.record.environment["parameters"],
            tokens_seen=tokens,
            bound=bound,
            nats=nats.value,
            interval=nats.interval,
            bits_per_byte=bits.value if bits else None,
            sampler=self._describe_sampler(),
            sample_entropy=_mean(entropies),
            nfe=_mean([sample["nfe"] for sample in self.samples]),
            train_seconds=1000 * seconds / max(tokens, 1),
            sample_seconds=1000 * self.sampling["seconds"] / sampled,
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


def _common_protocol(reports: Sequence[_Report]) -> dict[str, Any]:
    """Return the evaluation settings, which must be equal in all runs.

    Raises ArgumentError with the list of settings that differ.
    """
    protocols = {str(report.place): report.protocol() for report in reports}
    common: dict[str, Any] = {}
    differing: list[str] = []
    for name in PROTOCOL:
        found = {}
        for place, protocol in protocols.items():
            if protocol[name] is not None:
                found[place] = protocol[name]
        common[name] = next(iter(found.values()), None)
        distinct = {json.dumps(value) for value in found.values()}  # lists have no hash
        if len(distinct) > 1:
            values = [f"{value} in {place}" for place, value in found.items()]
            differing.append(f"  {name}: {', '.join(values)}")
    if differing:
        lines = "\n".join(differing)
        raise ArgumentError(
            "ddiff compare: these runs were not evaluated alike, so the results are not "
            f"comparable. Different settings:\n{lines}\n"
            "Train with the same [data] and [tokenizer]. Window, draws and rows can be changed "
            "after training, for example with ddiff eval RUN_DIR --set evaluate.draws=4."
        )
    return common


def _average_seeds(reports: Sequence[_Report]) -> Row:
    """Return one row of the table: the mean over runs that differ only in the seed.

    For a single run, return the row of the run.
    """
    rows = [report.row() for report in reports]
    if len(rows) == 1:
        return rows[0]
    _check_seeds(reports)
    nats = [row.nats for row in rows]
    mean = statistics.fmean(nats)
    # The interval is over seeds only. The intervals of the single runs over documents are not used.
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    half = student95(len(nats) - 1) * standard_error
    first = rows[0]
    names = list(dict.fromkeys(row.run for row in rows))  # distinct, in order
    return Row(
        run=_join_names(names),
        process=first.process,
        seeds=len(rows),
        parameters=first.parameters,
        tokens_seen=statistics.fmean(row.tokens_seen for row in rows),
        bound=first.bound,
        nats=mean,
        interval=(mean - half, mean + half),
        bits_per_byte=_mean_if_known([row.bits_per_byte for row in rows]),
        sampler=first.sampler,
        sample_entropy=_mean_if_known([row.sample_entropy for row in rows]),
        nfe=_mean_if_known([row.nfe for row in rows]),
        train_seconds=statistics.fmean(row.train_seconds for row in rows),
        sample_seconds=_mean_if_known([row.sample_seconds for row in rows]),
    )


def _check_seeds(reports: Sequence[_Report]) -> None:
    seeds = [report.recipe["seed"] for report in reports]
    if len(set(seeds)) < len(seeds):
        places = [f"{report.place} (seed {seed})" for report, seed in zip(reports, seeds)]
        raise ArgumentError(
            "ddiff compare --seeds: two runs have the same recipe and seed: "
            f"{', '.join(places)}. Give each seed once."
        )


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values, or None if a value is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _join_names(names: Sequence[str]) -> str:
    """Join names that begin alike in the brace notation of a shell: a_{0,1,2}."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071  # by characters, not by folders
    return f"{shared}{{{','.join(name.removeprefix(shared) for name in names)}}}"


def _notes(reports: Sequence[_Report]) -> list[str]:
    """Return sentences that explain the table, such as the meaning of its ± signs."""
    notes = [
        "± is half the 95 % interval (Student): over documents for one run, over seeds for several."
    ]
    if any(report.evaluation["bound"] == "NLL" for report in reports):
        notes.append(
            "NLL is exact. NELBO is an upper bound of the NLL, which is unknown for those models."
        )
    places = set()
    for report in reports:
        environment = report.record.environment
        layout = [environment.get(key) for key in ("device", "threads", "machine")]
        places.add(str(layout))
    if len(places) > 1:
        notes.append(
            "Seconds were measured in different layouts (device, threads, machine): "
            f"{', '.join(sorted(places))}."
        )
    for report in reports:
        init = report.record.environment.get("init")
        if init:
            source = init.get("run") or init.get("model")
            notes.append(
                f"{report.place} started from the weights of {source}; tokens seen do not include "
                "the training of these weights."
            )
    first = reports[0].evaluation
    entropy = first.get(f"entropy_rate_nats_per_{first['unit']}")
    if entropy is not None:
        notes.append(
            f"Entropy rate of the source: {entropy:.4f} nats, a lower limit for every model."
        )
    return notes
