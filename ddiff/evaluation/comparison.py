"""Comparison of finished runs in one table: `ddiff compare RUN RUN ...`.

The comparison reads only files in run directories and does not import torch. Runs are compared only
if all were evaluated on the same validation tokens with the same length, window and draws.
Otherwise an error lists the differences. The figures of generated samples have columns if
generation.json exists (`ddiff.evaluation.generation_comparison`).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ddiff.errors import ArgumentError
from ddiff.evaluation.compared_run import (
    BOUND_ONLY,
    PROTOCOL,
    ComparedRun,
    Row,
    count_common_rows,
)
from ddiff.evaluation.generation_comparison import (
    Generated,
    Value,
    describe_generation_settings,
    find_common_generation,
    note_sampling_differences,
)
from ddiff.evaluation.intervals import student95
from ddiff.run_dir.destination import check_destination, write_text


@dataclass(frozen=True)
class Comparison:
    """Table of runs with the same evaluation settings, and baselines on the same tokens.

    Attributes:
        protocol: evaluation settings and numbers of tokens and documents.
        baselines: name of each baseline -> nats per unit.
        rows: rows of the table.
        notes: sentences that explain the table.
        generation: settings with which the samples were evaluated; None if no run has figures of
            samples.
    """

    protocol: Mapping[str, Any]
    baselines: Mapping[str, float]
    rows: Sequence[Row]
    notes: Sequence[str]
    generation: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        titles, cells = self.columns()
        lines = ["  ".join(titles), *["  ".join(row) for row in cells]]
        return "\n".join(["Comparison:", *lines])

    def _repr_markdown_(self) -> str:
        """Return the table as Markdown, which notebooks display."""
        return self._table() + "\n\n" + self._list_remarks()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles and the cells of the table as text.

        Returns:
            - the titles of the columns,
            - a list of cells for each row.
        """
        columns = dict(COLUMNS)
        if any(row.generated for row in self.rows):
            # the samples of samples.jsonl are others, so their figures have no columns then
            columns = {**columns, **GENERATED_COLUMNS}
            for title in REPLACED_COLUMNS:
                del columns[title]
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
        return f"`{command}`\n\n{self._table()}\n\n{self._list_remarks()}\n"

    def _table(self) -> str:
        titles, cells = self.columns()
        lines = [titles, ["---"] * len(titles), *cells]
        return "\n".join(_markdown_row(line) for line in lines)

    def _list_remarks(self) -> str:
        return "\n".join(f"- {note}" for note in self.remarks())

    def remarks(self) -> list[str]:
        """Return sentences on the evaluation settings and the baselines, followed by the notes."""
        protocol = self.protocol
        unit = protocol["unit"]
        settings = [
            f"{name} {protocol[name]}" for name in PROTOCOL if protocol.get(name) is not None
        ]
        remarks = [
            f"Evaluated alike: {', '.join(settings)}; {protocol[f'{unit}s']:,} {unit}s in "
            f"{protocol['documents']} documents."
        ]
        if self.baselines:
            baselines = [f"{name} {value:.4f}" for name, value in self.baselines.items()]
            remarks.append(f"Baselines, nats/{unit} on the same {unit}s: {', '.join(baselines)}.")
        if self.generation is not None:
            remarks.append(describe_generation_settings(self.generation))
        return [*remarks, *self.notes]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _bound_cell(row: Row) -> str:
    if not row.interval:
        return f"{row.nats:.4f}"
    low, high = row.interval
    return f"{row.nats:.4f} ± {(high - low) / 2:.4f}"


def _optional(form: str, value: float | Value | None) -> str:
    return "–" if value is None else form.format(value)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "process": lambda row: row.process,
    "seeds": lambda row: str(row.seeds),
    "parameters": lambda row: f"{row.parameters:,}",
    "tokens seen": lambda row: _optional("{:,.0f}", row.tokens_seen),
    "bound": lambda row: row.bound,
    "nats/{unit}": _bound_cell,
    "bits/byte": lambda row: _optional("{:.4f}", row.bits_per_byte),
    "sampler": lambda row: row.sampler,
    "sample entropy, nats": lambda row: _optional("{:.3f}", row.sample_entropy),
    "NFE": lambda row: _optional("{:.1f}", row.nfe),
    "train s/1k": lambda row: _optional("{:.3f}", row.train_seconds),
    "sample s/1k": lambda row: _optional("{:.3f}", row.sample_seconds),
}
"""Title of each column, and a function that returns the cell of a row."""

REPLACED_COLUMNS = ("sampler", "sample entropy, nats", "NFE")
"""Columns of samples.jsonl that are left out next to `GENERATED_COLUMNS`."""


def _generated_cell(form: Callable[[Generated], str]) -> Callable[[Row], str]:
    """Return a function that returns the cell of a row, "–" without figures of samples."""

    def make_cell(row: Row) -> str:
        return "–" if row.generated is None else form(row.generated)

    return make_cell


GENERATED_COLUMNS: dict[str, Callable[[Row], str]] = {
    "samples drawn by": _generated_cell(lambda found: found.sampler),
    "NFE of samples": _generated_cell(lambda found: f"{found.nfe:.1f}"),
    "entropy, nats": _generated_cell(lambda found: f"{found.entropy:.3f}"),
    "judge perplexity": _generated_cell(lambda found: found.describe_perplexity()),
    "distinct-2": _generated_cell(lambda found: _optional("{:.3f}", found.distinct_2)),
    "share of words in held-out text": _generated_cell(
        lambda found: _optional("{:.3f}", found.known_words)
    ),
}
"""Columns of generation.json, which exist if some run has the file."""


def compare(
    run_dirs: Sequence[str | Path], *, group_seeds: bool = False, generation: bool = True
) -> Comparison:
    """Compare finished runs, given by their directories.

    Args:
        run_dirs: directories of the runs.
        group_seeds: whether runs that differ only in the seed are averaged to one row.
        generation: whether the figures of samples in generation.json are compared, if some run has
            the file.

    Raises CheckpointError if a run is not finished or one of its files is damaged, and
    ArgumentError if the evaluation settings of the runs differ.
    """
    if not run_dirs:
        raise ArgumentError("ddiff compare: give at least one run directory, such as runs/<name>.")
    reports = [ComparedRun(Path(run_dir), generation) for run_dir in run_dirs]
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
    records = {report.place: report.generated for report in reports if report.generated}
    common = find_common_generation(records)
    rows = _make_rows(reports, group_seeds)
    notes = [*_notes(reports), *note_sampling_differences(records)]
    return Comparison(protocol, baselines, rows, notes, common)


def _make_rows(reports: Sequence[ComparedRun], group_seeds: bool) -> list[Row]:
    groups: dict[str, list[ComparedRun]] = {}
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


def _common_protocol(reports: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return the evaluation settings, which must be equal in all runs.

    Raises ArgumentError with the list of settings that differ.
    """
    protocols = {str(report.place): report.protocol() for report in reports}
    common: dict[str, Any] = {}
    differing: dict[str, dict[str, Any]] = {}
    for name in PROTOCOL:
        found = {}
        for place, protocol in protocols.items():
            if protocol[name] is not None:
                found[place] = protocol[name]
        common[name] = next(iter(found.values()), None)
        distinct = {json.dumps(value) for value in found.values()}  # lists have no hash
        if len(distinct) > 1:
            differing[name] = found
    if differing:
        lines = "\n".join(
            f"  {name}: {', '.join(f'{value} in {place}' for place, value in found.items())}"
            for name, found in differing.items()
        )
        raise ArgumentError(
            "ddiff compare: these runs were not evaluated alike, so the results are not "
            f"comparable. Different settings:\n{lines}\n{_advise(differing)}"
        )
    return common


def _advise(differing: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how the runs can be made comparable, from their values of the differing settings."""
    keys = {}
    for name, found in differing.items():
        values = list(found.values())
        if name in BOUND_ONLY:
            keys[f"evaluate.{name}"] = json.dumps(values[0])
        elif name == "data" and (rows := count_common_rows(values)):
            keys["evaluate.rows"] = rows
        else:
            return "Train the runs with the same [data] and [tokenizer]."
    settings = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in keys.items())
    return f"Evaluate each of the runs again: ddiff eval RUN_DIR {settings}"


def _average_seeds(reports: Sequence[ComparedRun]) -> Row:
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
        tokens_seen=_mean_if_known([row.tokens_seen for row in rows]),
        bound=first.bound,
        nats=mean,
        interval=(mean - half, mean + half),
        bits_per_byte=_mean_if_known([row.bits_per_byte for row in rows]),
        sampler=first.sampler,
        generated=Generated.mean([row.generated for row in rows]),
        sample_entropy=_mean_if_known([row.sample_entropy for row in rows]),
        nfe=_mean_if_known([row.nfe for row in rows]),
        train_seconds=_mean_if_known([row.train_seconds for row in rows]),
        sample_seconds=_mean_if_known([row.sample_seconds for row in rows]),
    )


def _check_seeds(reports: Sequence[ComparedRun]) -> None:
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


def _notes(reports: Sequence[ComparedRun]) -> list[str]:
    """Return sentences that explain the table, such as the meaning of its ± signs."""
    notes = [
        "± is half the 95 % interval (Student): over documents for one run, over seeds for several."
    ]
    if any(report.evaluation["bound"] == "PUBLISHED" for report in reports):
        notes.append(
            "PUBLISHED follows the rules of published programs. It is not a bound, and may be "
            "below the entropy."
        )
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
    for report in reports:
        if warning := report.evaluation.get("warning"):
            notes.append(f"{report.place}: {warning}")
    return notes
