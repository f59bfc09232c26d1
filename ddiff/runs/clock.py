"""Search for the level clock of a trained tree with the smallest bound, and use of the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock
from ddiff.core.fixed_prediction import smooth_counts
from ddiff.core.level_paths import choose_points, make_diagonal, make_path_clock
from ddiff.core.schedule import BernsteinSchedule
from ddiff.core.tree import TreeProcess
from ddiff.data.batch import Batch
from ddiff.data.packing import batch_rows
from ddiff.errors import ArgumentError
from ddiff.evaluation.level_clocks import (
    ChosenPath,
    MeasuredField,
    ReferencedObjective,
    choose_path,
    compare_nats,
    measure_field,
    split_documents,
)
from ddiff.evaluation.likelihood import score_documents
from ddiff.evaluation.likelihood_sums import DocumentSums
from ddiff.evaluation.ratio import RatioEstimate
from ddiff.nn.network import as_network
from ddiff.progress import show_progress
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.run_dir.clock_record import (
    ClockBound,
    ClockName,
    ClockRecord,
    FieldPoint,
)
from ddiff.run_dir.command_record import Estimate
from ddiff.run_dir.evaluation_record import Provenance
from ddiff.run_dir.files import CLOCK
from ddiff.run_dir.location import check_writable
from ddiff.runs.evaluation import evaluated_rows
from ddiff.runs.evaluation_header import (
    describe_components,
    describe_provenance,
    fingerprint_weights,
)
from ddiff.runs.loading import load
from ddiff.runs.provenance import changed_data_error
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.training.context import build_context

FEWEST_DOCUMENTS = 8
"""Smallest number of validation documents: the half that is compared then has 4."""

FEWEST_CELLS = 4
"""Smallest fineness of the measured points. Polynomials of degree 3 have 10 coefficients for two
levels and 20 for three; 4 gives 15 and 35 points."""

LARGEST_LATTICE = 1000
"""About the largest number of nodes of the lattice on which the path is searched."""

MOST_CELLS = 32
"""Largest number of parts into which the lattice divides each occupancy."""

INSIDE = 0.1
"""Share of the recipe's occupancies in the other clocks. Without it, a path may touch an edge of
the occupancies, where rates are infinite."""

DIAGONAL_DRAWS = 4
"""Draws of the diagonal per draw of the other clocks. On the diagonal only few positions are at a
level between tokens and mask, so that its estimate has more noise."""


@dataclass(frozen=True)
class ClockSearch:
    """Settings of the search for a clock.

    Attributes:
        cells: fineness of the measured points, as in `choose_points`; 6 gives 28 points for two
            levels above the tokens.
        field_draws: draws of states per row and point.
        draws: draws per row in the comparison of the clocks.
        rows: number of evaluated rows, evenly spaced over the validation rows; None: those of
            [evaluate] rows.
    """

    cells: int = 6
    field_draws: int = 1
    draws: int = 4
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.cells < FEWEST_CELLS:
            raise ArgumentError(
                f"ClockSearch: cells must be at least {FEWEST_CELLS}; got {self.cells}. Fewer "
                "points do not determine the polynomials that are fitted to the field."
            )
        counts = {"field_draws": self.field_draws, "draws": self.draws}
        for name, value in counts.items():
            if value < 1:
                raise ArgumentError(f"ClockSearch: {name} must be at least 1; got {value}.")
        if self.rows is not None and self.rows < FEWEST_DOCUMENTS:
            raise ArgumentError(
                f"ClockSearch: rows must be at least {FEWEST_DOCUMENTS}; got {self.rows}."
            )


def find_clock(run: str | Path | Run, search: ClockSearch | None = None) -> ClockRecord:
    """Find the level clock of a trained tree with the smallest bound.

    The field of the bound is measured on half of the validation documents, and the path with the
    smallest integral is found by dynamic programming. On the other half, the bounds of the
    diagonal (masked diffusion), of the recipe's clock and of the found path are estimated with
    equal random numbers. `choice` of the result is the clock with the smallest bound.

    Every bound of the result is valid for the trained network. If training had only occupancies on
    the path of the recipe's clock, predictions far from this path may be worse, which favours the
    recipe's clock. `times = "occupancy"` in [objective] trains near the path.

    Args:
        run: run, or the directory of a run.
        search: settings of the search.

    Raises ArgumentError for a run without a tree of two or more levels above the tokens, for a run
    with several noise times per sequence, and for fewer than 8 validation documents.
    """
    if not isinstance(run, Run):
        loaded = load(run)
        require_text_recipe(loaded.recipe, "ddiff clock")
        return find_clock(loaded, search)
    search = search or ClockSearch()
    process = _require_tree(run)
    if run.clock_source != "recipe":
        raise ArgumentError(
            "find_clock: the run must have the clock of its recipe, which is compared with others; "
            f'got clock_source = "{run.clock_source}". Load the run with '
            f"ddiff.load({str(run.run_dir)!r})."
        )
    changed = run.find_changed_data()
    if changed:
        raise changed_data_error(run.run_dir, changed)
    start = time.monotonic()
    texts = _SearchTexts.of(run, search)
    run.objective.module.eval()  # no dropout
    measured = _measure(run, process, texts, search)
    reference = process.clock.cdf(torch.linspace(0.0, 1.0, 257, dtype=torch.float64))
    chosen = choose_path(measured, reference, _count_cells(process.clock.num_levels))
    clocks = _make_clocks(process, chosen)
    sums = _score_clocks(run, process, texts, clocks, search)
    return _make_record(run, measured, chosen, clocks, sums, search, texts, start)


def find_run_clock(
    run_dir: str | Path, search: ClockSearch | None = None
) -> tuple[ClockRecord, Path]:
    """Run `ddiff clock`: find the clock of a run, and write clock.json. Returns both."""
    run = load(run_dir)
    require_text_recipe(run.recipe, "ddiff clock")
    check_writable(run.run_dir)
    record = find_clock(run, search)
    path = run.run_dir / CLOCK
    write_run_file(path, record.to_json())
    return record, path


# ---------------------------------------------------------------------- parts of the search


@dataclass(frozen=True)
class _SearchTexts:
    """Validation rows of a run, divided into two halves by documents.

    Attributes:
        run: the run.
        numbers: [R] indices of the rows.
        document: [R] number of the document of each row.
        measured, compared: indices into `numbers` of the two halves.
    """

    run: Run
    numbers: NDArray[np.int64]
    document: NDArray[np.int64]
    measured: NDArray[np.int64]
    compared: NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, search: ClockSearch) -> _SearchTexts:
        numbers = evaluated_rows(run.data, run.recipe)
        if search.rows is not None and search.rows < len(numbers):
            numbers = numbers[np.arange(search.rows) * len(numbers) // search.rows]
        document = run.data.validation_rows.first_documents()[numbers]
        count = len(np.unique(document))
        if count < FEWEST_DOCUMENTS:
            raise ArgumentError(
                f"find_clock: the validation text must have at least {FEWEST_DOCUMENTS} documents, "
                "since the path is found on one half of them and compared on the other; got "
                f"{count} documents in {len(numbers)} rows. Raise [evaluate] rows, or train with "
                "more validation documents."
            )
        return cls(run, numbers, document, *split_documents(document))

    def batches(self, half: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Batch]:
        """Return the function that maps indices into a half to the batch of these rows."""
        data = self.run.data

        def batch_of(places: NDArray[np.int64]) -> Batch:
            numbers = self.numbers[half[places]]
            batch = batch_rows(data.validation_rows, numbers, conditions=data.validation_conditions)
            return batch.to(self.run.device)

        return batch_of


def _require_tree(run: Run) -> TreeProcess:
    """Return the tree process of a run. Raises ArgumentError for other runs."""
    process = run.process
    if not isinstance(process, TreeProcess) or not process.has_level_paths:
        name = "model without a process" if process is None else type(process).__name__
        raise ArgumentError(
            "find_clock: the process must be a tree of two or more levels above the tokens, such "
            f"as clusters and a mask; {run.run_dir} has a {name}. With one level, every clock has "
            "the same bound."
        )
    times = run.objective.times
    if times is None or not times.has_one_time:
        raise ArgumentError(
            "find_clock: all positions of a sequence must have the same noise time; got the time "
            f'rule {type(times).__name__}. Train with [objective] times = "flat" or "occupancy".'
        )
    if run.step == 0:
        raise ArgumentError(
            f"find_clock: {run.run_dir} must hold a trained run; got one without a checkpoint. "
            "Train it with `ddiff run`."
        )
    return process


def _count_cells(num_levels: int) -> int:
    """Return the number of cells of the lattice, fewer for many levels."""
    cells = MOST_CELLS
    # A lattice of L levels has about cells^L / L! nodes.
    while cells > 4 and cells**num_levels > LARGEST_LATTICE * np.prod(range(1, num_levels + 1)):
        cells -= 1
    return cells


def _measure(
    run: Run, process: TreeProcess, texts: _SearchTexts, search: ClockSearch
) -> MeasuredField:
    points = choose_points(process.clock.num_levels, search.cells)
    keys = run.recipe.evaluate
    total = len(points) * len(texts.measured) * search.field_draws
    with show_progress(total, "1/2 measuring the field of the bound") as bar:
        return measure_field(
            process,
            lambda batch: as_network(run.denoiser, process, build_context(batch)),
            texts.batches(texts.measured),
            texts.document[texts.measured],
            points,
            log_p=log_token_frequencies(run),
            length=run.recipe.length,
            draws=search.field_draws,
            batch=keys.batch,
            seed=keys.seed,
            bar=bar,
        )


def log_token_frequencies(run: Run) -> Tensor:
    """Return the log-probabilities [V] of the tokens in the training text, on the device."""
    counts = torch.from_numpy(np.array(run.data.train_rows.token_counts()))
    return smooth_counts(counts).to(run.device)


def _make_clocks(process: TreeProcess, chosen: ChosenPath) -> dict[ClockName, LevelClock]:
    """Return the compared clocks, the diagonal first."""
    diagonal = make_diagonal(process.clock.num_levels)
    clocks: dict[ClockName, LevelClock] = {
        "diagonal": make_path_clock(diagonal, process.clock, INSIDE),
        "recipe": process.clock,
    }
    if chosen.path is not None:
        clocks["found"] = make_path_clock(chosen.path, process.clock, INSIDE)
    return clocks


def _score_clocks(
    run: Run,
    process: TreeProcess,
    texts: _SearchTexts,
    clocks: Mapping[ClockName, LevelClock],
    search: ClockSearch,
) -> dict[ClockName, DocumentSums]:
    """Return the nats of the compared documents under each clock, with equal random numbers."""
    keys = run.recipe.evaluate
    times = run.objective.times
    assert times is not None  # checked by `_require_tree`
    log_p = log_token_frequencies(run)
    sums: dict[ClockName, DocumentSums] = {}
    draws = dict.fromkeys(clocks, search.draws)
    draws["diagonal"] *= DIAGONAL_DRAWS
    total = sum(draws.values()) * len(texts.compared)
    with show_progress(total, "2/2 comparing clocks") as bar:
        for name, clock in clocks.items():
            other = run.with_clock(clock)
            assert isinstance(other.process, TreeProcess)
            sums[name] = score_documents(
                ReferencedObjective(other.objective, other.process, log_p),
                texts.batches(texts.compared),
                texts.document[texts.compared],
                length=run.recipe.length,
                times=times.with_window(*keys.window, run.recipe.length),
                draws=draws[name],
                batch=keys.batch,
                seed=keys.seed,
                device=run.device,
                bar=bar,
            )
    return sums


# ---------------------------------------------------------------------- record


def _make_record(
    run: Run,
    measured: MeasuredField,
    chosen: ChosenPath,
    clocks: Mapping[ClockName, LevelClock],
    sums: Mapping[ClockName, DocumentSums],
    search: ClockSearch,
    texts: _SearchTexts,
    start: float,
) -> ClockRecord:
    bounds = _describe_bounds(clocks, sums)
    best = min(bounds, key=lambda bound: bound.bound.value)
    times = run.objective.times
    weights = {"weights": fingerprint_weights(run)}
    seconds = time.monotonic() - start
    return ClockRecord(
        run=run.recipe.name,
        step=run.step,
        weights="ema" if run.uses_ema else "trained",
        trained_near_path=times is not None and times.has_detours,
        protocol=_describe_protocol(run, search, texts),
        field=_describe_field(measured),
        gains=dict(chosen.gains),
        fitted_gain=chosen.fitted_gain,
        path=None if chosen.path is None else chosen.path.tolist(),
        bounds=bounds,
        choice=best.name,
        fingerprints={**weights, **run.fingerprints()},
        components=describe_components(run),
        provenance=Provenance.model_validate(describe_provenance(run, seconds)),
    )


def _describe_protocol(run: Run, search: ClockSearch, texts: _SearchTexts) -> dict[str, Any]:
    keys = run.recipe.evaluate
    assert isinstance(run.process, TreeProcess)
    return {
        "rows": len(texts.numbers),
        "measured_documents": len(np.unique(texts.document[texts.measured])),
        "compared_documents": len(np.unique(texts.document[texts.compared])),
        "field_draws": search.field_draws,
        "draws": search.draws,
        "diagonal_draws": search.draws * DIAGONAL_DRAWS,
        "cells": search.cells,
        "lattice": _count_cells(run.process.clock.num_levels),
        "inside": INSIDE,
        "window": list(keys.window),
        "length": run.recipe.length,
        "seed": keys.seed,
    }


def _describe_field(measured: MeasuredField) -> list[FieldPoint]:
    columns: Sequence[Tensor] = (
        measured.points,
        measured.means(),
        measured.standard_errors(),
        measured.positions.sum(1),
    )
    found = []
    for point, nats, errors, positions in zip(*(each.tolist() for each in columns), strict=True):
        found.append(
            FieldPoint(occupancies=point, nats=nats, standard_errors=errors, positions=positions)
        )
    return found


def _describe_bounds(
    clocks: Mapping[ClockName, LevelClock], sums: Mapping[ClockName, DocumentSums]
) -> list[ClockBound]:
    found = []
    for name, clock in clocks.items():
        own = sums[name]
        found.append(
            ClockBound(
                name=name,
                bound=_describe_estimate(RatioEstimate.of(own.nats, own.tokens)),
                minus_diagonal=_describe_estimate(compare_nats(own, sums["diagonal"])),
                minus_recipe=_describe_estimate(compare_nats(own, sums["recipe"])),
                occupancies=_list_occupancies(name, clock),
            )
        )
    return found


def _describe_estimate(found: RatioEstimate) -> Estimate:
    interval = None if found.total is None else found.total.around(found.mean)
    return Estimate(value=found.mean, interval=interval)


def _list_occupancies(name: ClockName, clock: LevelClock) -> list[list[float]] | None:
    """Return the table of a clock, one list per level; None for the clock of the recipe."""
    if name == "recipe":
        return None
    assert isinstance(clock, CdfClock)
    tables = []
    for schedule in clock.schedules:
        assert isinstance(schedule, BernsteinSchedule)
        tables.append(list(schedule.values))
    return tables
