"""Print the results of a run of several fields: bounds, controls, findings and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ddiff.console import make_console, print_table
from ddiff.data.pictures import Picture
from ddiff.errors import shorten
from ddiff.evaluation.intervals import FEWEST_SHUFFLED
from ddiff.runs.fields.rate import RATE_DISTORTION, list_parts
from ddiff.runs.findings import make_table, print_findings, warn_of_few
from ddiff.runs.summary import print_heading, print_next_commands
from ddiff.training.settings import TrainingSummary

if TYPE_CHECKING:
    from ddiff.runs.fields.run import FieldsRun

SHOWN = 3  # samples of each target
SMALLEST_WIDTH = 1e-12  # of an interval, as a fraction of the mean; a smaller one is rounding
LONGEST_VALUE = 72  # characters of a shown value


def print_summary(
    run: FieldsRun,
    summary: TrainingSummary,
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    judged: Mapping[str, Any],
    written: Sequence[str],
) -> None:
    """Print the results of a run: metrics, samples, paths and suggested commands.

    Args:
        run: the trained run.
        summary: summary of the training.
        report: content of evaluation.json.
        samples: lines of samples.jsonl.
        judged: content of judged.json; empty without a judge.
        written: names of the written files.
    """
    console = make_console()
    title = f"fields {', '.join(run.model.fields)}"
    if run.uses_ema:
        title += ", the exponential moving average of the weights"
    print_heading(console, run.run_dir, title, run.denoiser, summary, "tokens and numbers")
    print_bounds(report, console)
    print_findings(judged, console)
    pictures = {name: values.picture for name, values in run.values.items()}
    print_samples(samples, pictures, console)
    sample_options = f"--count 4 --target '{run.recipe.sample.targets[-1]}'"
    print_next_commands(console, run.run_dir, written, sample_options, summary.step)


def print_bounds(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the bounds of all targets with their parts by field, controls and exact limits."""
    console = console or make_console()
    table = make_table("validation", "nats", "", "")
    for name, bounds in report["targets"].items():
        sizes = f"{bounds['samples']:,} samples"
        table.add_row(
            Text(name, "bold"), *_cells(bounds, "nats_per_sample"), f"per sample, {sizes}"
        )
        for field, figures in bounds["fields"].items():
            unit = report["units"][field]
            size = f"per {unit}"
            if field in bounds["notes"]:
                size += f", {bounds['notes'][field]}"
            table.add_row(f"  {field}", *_cells(figures, "nats_per_item"), size)
            for term, value in figures["terms"].items():
                table.add_row(f"    {term}", f"{value:.4f}", "", "")
        for label, mean, interval, unit in list_parts(bounds.get(RATE_DISTORTION)):
            figures = {"mean": mean, "interval": interval}
            table.add_row(f"  {label}", *_cells(figures, "mean"), unit)
        for control, found in bounds["controls"].items():
            note = CONTROLS[control]
            if found["excess_interval"] is not None:
                low, high = found["excess_interval"]
                note += f", larger by {found['excess_nats_per_sample']:.4f}"
                note += f" [{low:.4f}, {high:.4f}]"
                if control == "shuffled" and bounds["samples"] < FEWEST_SHUFFLED:
                    note += f", may be too narrow for fewer than {FEWEST_SHUFFLED} samples"
            table.add_row(f"  {control}", *_cells(found, "nats_per_sample"), note)
        for control in bounds["untrained_controls"]:
            table.add_row(f"  {control}", "", "", "not computed: the training does not cover it")
        entropy = bounds["entropy_nats_per_sample"]
        if entropy is not None:
            note = "of the source: a lower limit for every model"
            table.add_row("  entropy", f"{entropy:.4f}", "", note)
    print_table(table, console)
    warn_of_few([bounds["samples"] for bounds in report["targets"].values()], console)
    for name, bounds in report["targets"].items():
        if bounds["is_below_entropy"]:
            console.print(
                f'WARNING: the bound of "{name}" is below the entropy of the source, which no '
                "model can reach. The bound or the entropy is wrong: do not use this result."
            )
        if bounds["own_vectors"]:
            console.print(
                f'"{name}" is not a likelihood of the text: {", ".join(bounds["own_vectors"])} is '
                "computed from the drawn text itself."
            )


CONTROLS = {
    "shuffled": "given fields of another sample",
    "noise": "given fields at their prior",
}


def _cells(figures: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the cells of a mean and its 95 % interval."""
    mean = f"{figures[key]:.4f}"
    if figures["interval"] is None:
        return mean, ""
    low, high = figures["interval"]
    if high - low <= SMALLEST_WIDTH * abs(figures[key]):
        return mean, "no interval: all draws are equal"
    return mean, f"[{low:.4f}, {high:.4f}]"


def print_samples(
    samples: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture | None],
    console: Console,
) -> None:
    """Print the first samples of every target. `pictures`: pictures of the fields that have one."""
    shown: dict[str, int] = {}
    for sample in samples:
        name = sample["target"]
        shown[name] = shown.get(name, 0) + 1
        if shown[name] > SHOWN:
            continue
        if shown[name] == 1:
            console.print(Text(f"\nsamples of {name}", "bold"))
        parts = []
        for field, value in sample["fields"].items():
            mark = " (given)" if field in sample["given"] else ""
            parts.append(f"{field}{mark}: {format_value(value, pictures.get(field))}")
        console.print(Text(f"  {'; '.join(parts)}"))


def format_value(value: Any, picture: Picture | None = None) -> str:
    """Return a plain value of a field as one line: a text, or the size of a picture or vector.

    `value`: value of one field in `samples.jsonl`. `picture`: the picture of the field.
    """
    if picture is not None:
        return f"{picture.rows} x {picture.columns} picture"
    if isinstance(value, Mapping) and "text" in value:
        return shorten(repr(value["text"]), LONGEST_VALUE)
    if isinstance(value, Mapping) and "vectors" in value:
        return _describe_vectors(value["vectors"])
    if isinstance(value, Mapping):
        value = next(iter(value.values()))
    return shorten(str(value), LONGEST_VALUE)


def _describe_vectors(vectors: Sequence[Any]) -> str:
    """Return the size of one vector [d] or of several vectors [n,d]."""
    if not isinstance(vectors[0], Sequence):
        return f"vector of {len(vectors)} numbers"
    width = len(vectors[0])
    if len(vectors) == 1:
        return f"vector of {width} numbers"
    return f"{len(vectors)} vectors of {width} numbers"
