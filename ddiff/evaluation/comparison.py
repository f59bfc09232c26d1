"""Runs side by side on equal footing: `ddiff compare RUN RUN ...`. Reads what runs have written; imports no torch.

Figures stand beside each other only where they were measured in the same way: same validation tokens, window, draws and
length. Otherwise the comparison is refused, and what differs is named.
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
    read_json,
    read_json_lines,
    read_recipe_tree,
)
from ddiff.run_dir.identity import Difference, check_recorded, raise_differences

PROTOCOL = ("unit", "length", "tokenizer", "data", "conditions", "window", "draws")
BOUND_ONLY = ("window", "draws")  # an exact likelihood is not integrated over time
WHOSE_OWN = ("name", "run_dir", "seed")  # what runs of one recipe may differ in


@dataclass(frozen=True)
class Row:
    """One run, or the mean of runs that differ in their seed alone.

    `nats` per unit, `bound` says whether of the NELBO or the exact NLL; its 95 % interval is over documents for one run and
    over `seeds` for several (None: too few). `sample_entropy`: nats of the unigram law of a sample's own tokens, mean over
    samples. `nfe`: runs of the network per sample. Seconds are per 1000 tokens, sampling in the batches of the recipe.
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
    """`rows` of runs that were evaluated by one `protocol`, `baselines` on the same tokens, `notes` to read them by."""

    protocol: Mapping[str, Any]
    baselines: Mapping[str, float]
    rows: Sequence[Row]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells, as a person reads them."""
        shown = [
            title
            for title in COLUMNS
            if title != "seeds" or any(row.seeds > 1 for row in self.rows)
        ]
        unit = self.protocol["unit"]
        return [title.format(unit=unit) for title in shown], [
            [COLUMNS[title](row) for title in shown] for row in self.rows
        ]

    def to_markdown(self, command: str) -> str:
        """One table, with the command that made it and how its figures were measured."""
        titles, cells = self.columns()
        lines = [titles, ["---"] * len(titles), *cells]
        table = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        notes = "\n".join(f"- {note}" for note in self.remarks())
        return f"`{command}`\n\n{table}\n\n{notes}\n"

    def remarks(self) -> list[str]:
        """How the figures were measured, and what to know before holding them against each other."""
        unit, protocol = self.protocol["unit"], self.protocol
        measured = ", ".join(
            f"{name} {protocol[name]}" for name in PROTOCOL if protocol.get(name) is not None
        )
        counted = ", ".join(f"{name} {value:.4f}" for name, value in self.baselines.items())
        return [
            f"Evaluated alike: {measured}; {protocol[f'{unit}s']:,} {unit}s in {protocol['documents']} documents.",
            f"Counting alone, nats/{unit} on the same {unit}s: {counted}.",
            *self.notes,
        ]


def _interval(row: Row) -> str:
    return f"{row.nats:.4f}" + (
        f" ± {(row.interval[1] - row.interval[0]) / 2:.4f}" if row.interval else ""
    )


def _shown(form: str, read: Callable[[Row], float | None]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = read(row)
        return "–" if value is None else form.format(value)

    return cell


COLUMNS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "process": lambda row: row.process,
    "seeds": lambda row: str(row.seeds),
    "parameters": lambda row: f"{row.parameters:,}",
    "tokens seen": lambda row: f"{row.tokens_seen:,.0f}",
    "bound": lambda row: row.bound,
    "nats/{unit}": _interval,
    "bits/byte": _shown("{:.4f}", lambda row: row.bits_per_byte),
    "sampler": lambda row: row.sampler,
    "sample entropy, nats": _shown("{:.3f}", lambda row: row.sample_entropy),
    "NFE": _shown("{:.1f}", lambda row: row.nfe),
    "train s/1k": _shown("{:.3f}", lambda row: row.train_seconds),
    "sample s/1k": _shown("{:.3f}", lambda row: row.sample_seconds),
}


def compare(run_dirs: Sequence[str | Path], *, group_seeds: bool = False) -> Comparison:
    """Finished runs by their directories; `group_seeds` averages runs of one recipe with several seeds.

    Raises CheckpointError where a run is not finished or a file of it is damaged, ArgumentError where the evaluations
    cannot be compared.
    """
    if not run_dirs:
        raise ArgumentError("ddiff compare: name at least one run directory, such as runs/<name>.")
    reports = [_Report(Path(run_dir)) for run_dir in run_dirs]
    if twice := [
        place
        for place, count in Counter(str(report.place) for report in reports).items()
        if count > 1
    ]:
        raise ArgumentError(f"ddiff compare: {twice[0]} is named twice. Name each run once.")
    protocol = _common_protocol(reports)
    groups: dict[str, list[_Report]] = {}
    for report in reports:
        groups.setdefault(
            report.recipe_but_seed() if group_seeds else str(report.place), []
        ).append(report)
    first = reports[0].evaluation
    counts = {name: first[name] for name in (f"{first['unit']}s", "documents")}
    counted = {name.split("_")[0]: value for name, value in first["baselines"].items()}
    rows = [_mean(group) for group in groups.values()]
    if len({row.run for row in rows}) < len(rows):  # names of recipes do not tell them apart
        places = (", ".join(str(report.place) for report in group) for group in groups.values())
        rows = [replace(row, run=place) for row, place in zip(rows, places)]
    return Comparison({**protocol, **counts}, counted, rows, _notes(reports))


def write_comparison(comparison: Comparison, directory: str | Path, command: str) -> list[Path]:
    """Write compare.json and compare.md to a directory, each whole or not at all; their paths are returned.

    Raises ArgumentError when the directory takes no files, or when a file of that name is not one that `ddiff compare`
    has written.
    """
    texts = {
        "compare.json": json.dumps({"command": command, **comparison.to_dict()}, indent=2) + "\n",
        "compare.md": comparison.to_markdown(command),
    }
    folder = check_destination(directory, "ddiff compare --out", folder=True)
    if folder.local is None:
        raise ArgumentError(
            f"ddiff compare --out: a folder of this machine was expected; got {directory}."
        )
    places = {
        name: check_destination(Path(directory) / name, "ddiff compare --out", owned=_is_comparison)
        for name in texts
    }
    for name, place in places.items():
        write_text(place, texts[name])
    return [Path(directory) / name for name in texts]


def _is_comparison(file: IO[bytes]) -> bool:
    """Whether a file begins as compare.json and compare.md do."""
    start = file.read(200).lstrip()
    return start.startswith(b"`ddiff compare") or b'"command": "ddiff compare' in start


class _Report:
    """What one run directory says of itself."""

    def __init__(self, place: Path) -> None:
        self.place = place
        if not (place / RECIPE).is_file():
            raise CheckpointError(
                f"{place} is not a run directory: it has no recipe.toml. Name one that `ddiff run` wrote: runs/<name>."
            )
        self.recipe = read_recipe_tree(place / RECIPE)
        self.environment = self._read(ENVIRONMENT, read_json)
        self.evaluation = self._read(EVALUATION, read_json)
        self.metrics = self._read(METRICS, read_json_lines)
        self.samples = self._read(SAMPLES, read_json_lines)
        self.sampling = self._read(SAMPLING, read_json)
        self._check_steps()
        self._check_trained_with()

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        path = self.place / name
        if not path.exists():
            raise CheckpointError(
                f"{self.place} is not finished: it has no {name}. Repeat `ddiff run` with its recipe: it goes on."
            )
        return read(path)

    def _check_trained_with(self) -> None:
        """Raise CheckpointError when the run's files speak of something else than its checkpoint was trained with."""
        state = newest_state(str(self.place / CHECKPOINTS))
        if state is None:
            return  # the figures stand, though the weights were deleted
        check_recorded(self.place, state)
        was, now = (
            state.get("fingerprints", {}).get("tokenizer"),
            self.evaluation["protocol"].get("tokenizer"),
        )
        if was is not None and now is not None and was != now:
            raise_differences(
                self.place,
                [Difference("tokenizer of evaluation.json", was, now)],
                "Evaluate it again: ddiff eval.",
            )

    def _check_steps(self) -> None:
        steps = {
            "metrics.jsonl": self.metrics[-1]["step"] if self.metrics else 0,
            "evaluation.json": self.evaluation["step"],
            "samples.jsonl": self.samples[-1]["step"] if self.samples else 0,
            "sampling.json": self.sampling["step"],
        }
        if len(set(steps.values())) > 1:
            told = ", ".join(f"{name} of step {step}" for name, step in steps.items())
            raise CheckpointError(
                f"{self.place} is not finished: it holds {told}. Repeat `ddiff run` with its recipe, so that all its files "
                "are of the last step."
            )

    def protocol(self) -> dict[str, Any]:
        found = self.evaluation["protocol"] | {"unit": self.evaluation["unit"]}
        exact = self.evaluation["bound"] == "NLL"
        return {
            name: None if exact and name in BOUND_ONLY else found.get(name) for name in PROTOCOL
        }

    def recipe_but_seed(self) -> str:
        return json.dumps(
            {key: value for key, value in self.recipe.items() if key not in WHOSE_OWN},
            sort_keys=True,
        )

    def row(self) -> Row:
        evaluation, unit = self.evaluation, self.evaluation["unit"]
        tokens = sum(line["tokens"] for line in self.metrics)
        interval, sampled = evaluation.get("interval"), self.sampling
        return Row(
            run=self.recipe["name"],
            process=_family(self.recipe),
            seeds=1,
            parameters=self.environment["parameters"],
            tokens_seen=tokens,
            bound=evaluation["bound"],
            nats=evaluation[f"{evaluation['bound'].lower()}_nats_per_{unit}"],
            interval=(interval[0], interval[1]) if interval else None,
            bits_per_byte=evaluation.get("bits_per_byte"),
            sampler=self._sampler(),
            sample_entropy=_average([_entropy(sample["ids"]) for sample in self.samples]),
            nfe=_average([sample["nfe"] for sample in self.samples]),
            train_seconds=1000 * sum(line["seconds"] for line in self.metrics) / max(tokens, 1),
            sample_seconds=1000 * sampled["seconds"] / max(sampled["tokens"], 1),
        )

    def _sampler(self) -> str:
        """Its kind and the steps that it took; – for one whose steps depend on the draws, whatever [sample] steps says."""
        asked = self.recipe["sample"]
        steps = self.sampling.get("steps", asked["steps"])  # not written by every earlier version
        return f"{asked['sampler']['kind']}, {'–' if steps is None else steps}"


def _family(recipe: Mapping[str, Any]) -> str:
    """The process, or the objective that needs none; and the time rule, where it is no flat one."""
    objective = recipe["objective"]
    if "process" not in recipe:
        return objective["kind"]
    times = objective.get("times", {}).get("kind", "flat")
    return recipe["process"]["kind"] + (f", {times}" if times != "flat" else "")


def _entropy(ids: Sequence[int]) -> float:
    """Nats of the unigram law of one sample's tokens."""
    shares = [count / len(ids) for count in Counter(ids).values()]
    return -sum(share * math.log(share) for share in shares)


def _average(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _common_protocol(reports: Sequence[_Report]) -> dict[str, Any]:
    """How all of them were evaluated; ArgumentError naming what differs."""
    protocols = [report.protocol() for report in reports]
    common: dict[str, Any] = {}
    differing: list[str] = []
    for name in PROTOCOL:
        found = {
            str(report.place): p[name]
            for report, p in zip(reports, protocols)
            if p[name] is not None
        }
        distinct = {json.dumps(value) for value in found.values()}
        common[name] = next(iter(found.values()), None)
        if len(distinct) > 1:
            differing.append(
                f"  {name}: " + ", ".join(f"{value} in {place}" for place, value in found.items())
            )
    if differing:
        lines = "\n".join(differing)
        raise ArgumentError(
            f"ddiff compare: these runs were not evaluated alike, so their figures do not belong in one table.\n{lines}\n"
            "Train on the same [data] and [tokenizer]; window, draws and how many "
            "rows are read are set anew by ddiff eval RUN_DIR --set evaluate.draws=4."
        )
    return common


def _mean(reports: Sequence[_Report]) -> Row:
    """The run's row, or the mean over the seeds of several runs with Student's interval over them."""
    rows = [report.row() for report in reports]
    if len(rows) == 1:
        return rows[0]
    seeds = [report.recipe["seed"] for report in reports]
    if len(set(seeds)) < len(seeds):
        places = ", ".join(f"{report.place} (seed {seed})" for report, seed in zip(reports, seeds))
        raise ArgumentError(
            f"ddiff compare --seeds: the same recipe and seed stand there twice: {places}. Name each once."
        )
    nats, first = [row.nats for row in rows], rows[0]
    mean, half = (
        statistics.fmean(nats),
        student95(len(nats) - 1) * statistics.stdev(nats) / math.sqrt(len(nats)),
    )

    def over(field: str) -> Any:
        values = [getattr(row, field) for row in rows]
        return None if None in values else statistics.fmean(values)

    return Row(
        run=_together(list(dict.fromkeys(row.run for row in rows))),
        process=first.process,
        seeds=len(rows),
        parameters=first.parameters,
        tokens_seen=over("tokens_seen"),
        bound=first.bound,
        nats=mean,
        interval=(mean - half, mean + half),
        bits_per_byte=over("bits_per_byte"),
        sampler=first.sampler,
        sample_entropy=over("sample_entropy"),
        nfe=over("nfe"),
        train_seconds=over("train_seconds"),
        sample_seconds=over("sample_seconds"),
    )


def _together(names: Sequence[str]) -> str:
    """Several names as a shell would take them: a_{0,1,2}."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071  # characters are meant, not folders
    return f"{shared}{{{','.join(name.removeprefix(shared) for name in names)}}}"


def _notes(reports: Sequence[_Report]) -> list[str]:
    """What a reader must know before holding two figures against each other."""
    notes = [
        "± is half the 95 % interval (Student): over documents for one run, over seeds for several."
    ]
    if any(report.evaluation["bound"] == "NLL" for report in reports):
        notes.append(
            "NLL is exact; NELBO is an upper bound of it: the true NLL of those models is not known."
        )
    places = {
        str([report.environment.get(key) for key in ("device", "threads", "machine")])
        for report in reports
    }
    if len(places) > 1:
        notes.append(
            f"Seconds were taken in different places (device, threads, machine): {', '.join(sorted(places))}."
        )
    for report in reports:
        if init := report.environment.get("init"):
            source = init.get("run") or init.get("model")
            notes.append(
                f"{report.place} began with weights of {source}; its tokens seen do not count that run's."
            )
    entropy = reports[0].evaluation.get(f"entropy_rate_nats_per_{reports[0].evaluation['unit']}")
    if entropy is not None:
        notes.append(f"Entropy rate of the source: {entropy:.4f} nats; no model is below it.")
    return notes
