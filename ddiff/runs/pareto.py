"""Command `ddiff pareto`: quality, diversity and cost of samples over a grid of settings.

Every run has its points in `pareto.json` of its run directory. A point is written as soon as it is
measured. A repeated command draws only points that the file does not contain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ddiff.errors import ArgumentError
from ddiff.evaluation.generation import MeanFigure, SampleFigures, collect_words
from ddiff.evaluation.judge_model import JudgeModel
from ddiff.progress import print_line, show_progress
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.run_dir.command_record import Estimate
from ddiff.run_dir.destination import Destination, check_destination, write_text
from ddiff.run_dir.evaluation_record import Provenance
from ddiff.run_dir.files import PARETO, PARETO_CHART
from ddiff.run_dir.location import check_writable
from ddiff.run_dir.pareto_record import (
    HeldOutText,
    ParetoRecord,
    Perplexity,
    SweepPoint,
    find_differences,
    read_pareto,
)
from ddiff.runs.evaluation_header import (
    describe_components,
    describe_provenance,
    fingerprint_weights,
)
from ddiff.runs.generation import (
    check_same_tokenizer,
    measure_perplexity,
    read_held_out_rows,
)
from ddiff.runs.judge_run import open_judge
from ddiff.runs.loading import load
from ddiff.runs.pareto_settings import SweepGrid, SweepSetting, choose_kinds, plan_settings
from ddiff.runs.pareto_table import TITLES, describe_records, make_rows
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.record import write_run_file
from ddiff.runs.report.pareto import draw_pareto_file, is_pareto_chart
from ddiff.runs.run import Run
from ddiff.runs.token_samples import TokenSamples

COUNT = 64
"""Default number of samples of a point."""

DISTINCT = 2  # length of the n-grams of distinct_2


@dataclass(frozen=True)
class SweepSampling:
    """Number and random numbers of the samples of every point.

    Attributes:
        count: number of samples.
        seed: seed of the samples; None for [sample] seed of each run.
        batch: samples in a batch, which does not change the samples; None for [sample] batch.
        retokenize: whether the judge tokenizes the texts of the samples again.
    """

    count: int = COUNT
    seed: int | None = None
    batch: int | None = None
    retokenize: bool = True


@dataclass(frozen=True)
class SweepResult:
    """Records of the runs of a sweep.

    Attributes:
        records: record of each run.
        remarks: sentences on the points.
        written: paths of the written files.
    """

    records: Sequence[ParetoRecord]
    remarks: Sequence[str]
    written: Sequence[Path]

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows of a table of all points."""
        return TITLES, make_rows(self.records)


def sweep_runs(
    run_dirs: Sequence[str | Path],
    judge: str,
    grid: SweepGrid | None = None,
    sampling: SweepSampling | None = None,
    *,
    fresh: bool = False,
    out: str | Path | None = None,
) -> SweepResult:
    """Run `ddiff pareto`: draw and judge samples at all settings, and draw the fronts.

    Args:
        run_dirs: directories of trained text runs.
        judge: directory of an autoregressive run, directory of a causal language model, or the name
            of a model on the hub.
        grid: steps, temperatures and samplers.
        sampling: number and random numbers of the samples.
        fresh: whether recorded points are deleted, and all points are drawn again.
        out: SVG file of the chart; by default `pareto.svg` in the directory of a single run, or
            in the working directory for several runs.

    Raises an error, before samples are drawn, if a setting or the judge does not fit a run, or if a
    run has points of another protocol and `fresh` is False.
    """
    place = None
    if out is not None or len(run_dirs) > 1:
        place = _check_chart(out or PARETO_CHART)
    sweep = Sweep.plan(
        run_dirs, judge, grid or SweepGrid(), sampling or SweepSampling(), fresh=fresh
    )
    for remark in sweep.remarks:
        print_line(remark)
    sweep.draw()
    records = [part.record for part in sweep.parts]
    written = [part.path for part in sweep.parts]
    drawing = draw_pareto_file(records)
    if place is None:
        chart = written[0].parent / PARETO_CHART
        write_run_file(chart, drawing)
    else:
        chart = Path(place.name)
        write_text(place, drawing)
    return SweepResult(records, describe_records(records), [*written, chart])


def _check_chart(path: str | Path) -> Destination:
    """Return the checked path of the chart, which must not be a file of the user."""

    def owned(file: IO[bytes]) -> bool:
        return is_pareto_chart(file.read(200))

    return check_destination(path, "ddiff pareto --out", suffix=".svg", owned=owned)


@dataclass
class RunSweep:
    """Settings and record of one run of a sweep.

    Attributes:
        run: the run.
        settings: all requested settings.
        record: record with the points that were measured so far.
        path: file of the record.
        words: words of the held-out text; None for texts without words.
    """

    run: Run
    settings: Sequence[SweepSetting]
    record: ParetoRecord
    path: Path
    words: set[str] | None

    def find_missing(self) -> list[SweepSetting]:
        """Return the settings without a point in the record."""
        known = {point.key for point in self.record.points}
        return [setting for setting in self.settings if setting.key not in known]

    def add(self, point: SweepPoint, seconds: float) -> None:
        """Add a point to the record, and write the record.

        `seconds`: duration of the command so far.
        """
        points = sorted([*self.record.points, point], key=_order)
        provenance = Provenance(**describe_provenance(self.run, seconds))
        self.record = self.record.model_copy(update={"points": points, "provenance": provenance})
        write_run_file(self.path, self.record.to_json())


def _order(point: SweepPoint) -> tuple[str, int, float, str]:
    temperature = -1.0 if point.temperature is None else point.temperature
    return point.kind, point.steps or 0, temperature, point.key


@dataclass(frozen=True)
class Sweep:
    """Checked settings of several runs, and the judge.

    Attributes:
        remarks: sentences on samplers that are left out for a run.
    """

    parts: Sequence[RunSweep]
    judge: JudgeModel
    sampling: SweepSampling
    remarks: Sequence[str]

    @classmethod
    def plan(
        cls,
        run_dirs: Sequence[str | Path],
        judge: str,
        grid: SweepGrid,
        sampling: SweepSampling,
        *,
        fresh: bool = False,
    ) -> Sweep:
        """Load the runs and the judge, and check everything that a point needs.

        The arguments are those of `sweep_runs`.
        """
        if sampling.count < 2:
            raise ArgumentError(
                "ddiff pareto: --count must be at least 2, because intervals need several samples; "
                f"got {sampling.count}."
            )
        runs = _load_runs(run_dirs)
        chosen, remarks = choose_kinds(runs, grid)
        settings = []
        for run, kinds in zip(runs, chosen):
            settings.append(plan_settings(run, kinds, grid, sampling.count))
            check_writable(run.run_dir)
        model = open_judge(judge, runs[0].device)
        parts = []
        for run, planned in zip(runs, settings):
            if not sampling.retokenize:
                check_same_tokenizer(run, model)
            parts.append(_start_record(run, planned, model, sampling, fresh))
        return cls(parts, model, sampling, remarks)

    def draw(self) -> None:
        """Measure all points that are missing in the records."""
        start = time.perf_counter()
        missing = [(part, setting) for part in self.parts for setting in part.find_missing()]
        total = sum(len(part.settings) for part in self.parts)
        with show_progress(total, "points", start=total - len(missing)) as bar:
            for part, setting in missing:
                point = measure_point(part, setting, self.judge, self.sampling)
                part.add(point, time.perf_counter() - start)
                bar.advance(1, perplexity=point.perplexity.value, entropy=point.entropy.value)


def _load_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Load the runs. Raises ArgumentError for a run of fields, and for a repeated run."""
    runs: list[Run] = []
    places: set[Path] = set()
    for directory in run_dirs:
        place = Path(directory).resolve()
        if place in places:
            raise ArgumentError(f"ddiff pareto: {directory} was given twice. Give each run once.")
        places.add(place)
        run = load(directory)
        require_text_recipe(run.recipe, "ddiff pareto")
        runs.append(run)
    if not runs:
        raise ArgumentError("ddiff pareto: give at least one run directory, such as runs/<name>.")
    return runs


def _start_record(
    run: Run,
    settings: Sequence[SweepSetting],
    judge: JudgeModel,
    sampling: SweepSampling,
    fresh: bool,
) -> RunSweep:
    """Return the sweep of a run with its recorded points, or without points if there are none.

    Raises ArgumentError if the recorded points have another protocol and `fresh` is False.
    """
    path = run.run_dir / PARETO
    rows = read_held_out_rows(run, sampling.count)
    protocol = _describe_protocol(run, judge, sampling, len(rows))
    fingerprints = {
        "weights": fingerprint_weights(run),
        **component_fingerprints(run.data, run.model),
        "validation rows": run.data.validation_rows.fingerprint,
    }
    words = _read_words(run)
    before = None if fresh else read_pareto(path)
    if before is not None:
        _check_same_protocol(path, before, protocol, fingerprints)
        return RunSweep(run, settings, before, path, words)
    samples = TokenSamples.split(rows, run)
    # the words of held-out rows occur in held-out text by definition
    figures = SampleFigures.of(samples.texts(), samples.ids, None, run.tokenizer.unit)
    record = ParetoRecord(
        run=run.recipe.name,
        step=run.step,
        weights="ema" if run.uses_ema else "trained",
        protocol=protocol,
        fingerprints=fingerprints,
        components=describe_components(run),
        held_out=HeldOutText(
            rows=len(rows), **_judge_samples(samples, figures, judge, sampling.retokenize)
        ),
        points=[],
    )
    return RunSweep(run, settings, record, path, words)


def _describe_protocol(
    run: Run, judge: JudgeModel, sampling: SweepSampling, rows: int
) -> dict[str, Any]:
    """Return the settings that are equal for all points of a run."""
    keys = run.recipe.sample
    weights = next(run.denoiser.parameters()).dtype
    protocol = {
        "count": sampling.count,
        "length": run.recipe.length,
        "unit": run.tokenizer.unit,
        "seed": keys.seed if sampling.seed is None else sampling.seed,
        "conditions": dict(keys.conditions),
        "guidance": keys.guidance,
        "precision": str(run.precision or weights).removeprefix("torch."),
        "tokenizer": run.tokenizer.fingerprint,
        "held_out": f"{rows} rows of {run.data.validation_rows.fingerprint}",
        "retokenized": sampling.retokenize,
        "judge": dict(judge.protocol),
    }
    # as it is read from the file, where tuples are lists
    found: dict[str, Any] = json.loads(json.dumps(protocol))
    return found


def _check_same_protocol(
    path: Path,
    before: ParetoRecord,
    protocol: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> None:
    """Raise ArgumentError if recorded points were measured in another way.

    Args:
        path: file of the recorded points.
        before: its content.
        protocol: protocol of the requested points.
        fingerprints: fingerprints of the run.
    """
    differing = []
    for name, (old, new) in find_differences(before.protocol, protocol).items():
        differing.append(f"{name} ({old} in the file, {new} now)")
    for name, value in fingerprints.items():
        if before.fingerprints.get(name) != value:
            differing.append(f"the {name} of the run")
    if differing:
        raise ArgumentError(
            f"ddiff pareto: {path} has {len(before.points)} points that were measured in another "
            f"way, and cannot be drawn together with new points. Different are "
            f"{', '.join(differing)}. Repeat the command with the settings of the file, or with "
            "--fresh to delete its points, or move the file away."
        )


def _read_words(run: Run) -> set[str] | None:
    """Return the words of the held-out text; None if the texts have no words."""
    texts = run.data.validation_texts
    if run.tokenizer.unit != "token" or texts is None:
        return None
    return collect_words(texts)


def measure_point(
    part: RunSweep, setting: SweepSetting, judge: JudgeModel, sampling: SweepSampling
) -> SweepPoint:
    """Draw the samples of one setting, and compute their figures."""
    start = time.perf_counter()
    run = part.run
    drawn = run.sample(
        sampling.count, seed=sampling.seed, batch=sampling.batch, sampler=setting.sampler
    )
    samples = TokenSamples.split([sample["ids"] for sample in drawn], run)
    # one text with each word once has the same words as the held-out text
    reference: Iterable[str] | None = None if part.words is None else [" ".join(part.words)]
    figures = SampleFigures.of(samples.texts(), samples.ids, reference, run.tokenizer.unit)
    judged = _judge_samples(samples, figures, judge, sampling.retokenize)
    return SweepPoint(
        sampler=setting.spec.to_dict(),
        steps=setting.steps,
        temperature=setting.temperature,
        nfe=sum(sample["nfe"] for sample in drawn) / len(drawn),
        seconds=time.perf_counter() - start,
        **judged,
    )


def _judge_samples(
    samples: TokenSamples, figures: SampleFigures, judge: JudgeModel, retokenize: bool
) -> dict[str, Any]:
    """Return the figures of samples as the fields of `JudgedFigures`."""
    found = measure_perplexity(samples, figures.entropy, judge, retokenize)
    return {
        "perplexity": Perplexity(value=found.corpus, interval=found.corpus_interval),
        "entropy": _estimate(figures.entropy),
        "distinct_2": figures.distinct.get(DISTINCT),
        "known_words": _estimate(figures.known_words),
        "scored": found.tokens,
    }


def _estimate(figure: MeanFigure | None) -> Estimate | None:
    return None if figure is None else Estimate(value=figure.value, interval=figure.interval)
