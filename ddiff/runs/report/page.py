"""Write the report of runs as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import IO

from ddiff.errors import ArgumentError
from ddiff.run_dir.destination import Destination, check_destination, write_file, write_text
from ddiff.runs.report.charts import (
    DARK,
    LIGHT,
    NUM_COLORS,
    STYLE,
    BarChart,
    Chart,
    color_variables,
    draw_file,
)
from ddiff.runs.report.clusters import read_tree
from ddiff.runs.report.confusions import make_confusions
from ddiff.runs.report.curves import make_charts
from ddiff.runs.report.extras import Extras
from ddiff.runs.report.formulas import make_formulas
from ddiff.runs.report.gaps import make_gaps
from ddiff.runs.report.markup import EMPTY, Markup, element, join, json_script, void_element
from ddiff.runs.report.pareto import make_pareto
from ddiff.runs.report.raster import draw_png, is_chart_image
from ddiff.runs.report.run_files import ReportedRun, read_runs
from ddiff.runs.report.sections import (
    make_clusters,
    make_environment,
    make_evaluation,
    make_pictures,
    make_recipes,
    make_samples,
    make_summary,
    section,
)
from ddiff.runs.report.tables import run_label
from ddiff.runs.report.training_samples import make_training_samples
from ddiff.runs.report.trajectories import AnyTrajectory

GENERATOR = "ddiff report"
# The browser then refuses every request of the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

PLAYER_NOTE = (
    "Each cell is a position of the sample. Step through the sampling, or play it. Trajectories "
    "of the same sample number were drawn from the same random numbers."
)


def write_report(
    run_dirs: Sequence[str | Path],
    path: str | Path,
    extras: Extras | None = None,
    figures: str | Path | None = None,
) -> list[Path]:
    """Write the report of runs, and return the paths of all written files.

    Args:
        run_dirs: directories of the runs.
        path: HTML file to write.
        extras: parts that are computed from checkpoints and plugins, or None.
        figures: folder for the charts as SVG and PNG files, or None.

    The files depend only on the content of the run directories and on `extras`. Raises
    ArgumentError if a path is not writable, or is a file that ddiff did not write, and
    CheckpointError for a damaged run.
    """
    place = check_report_path(path)
    runs = read_runs(run_dirs)
    charts = make_charts(runs)
    page = make_page(runs, charts, extras)
    written = [Path(path)]
    if figures is not None:
        written += write_figures(runs, charts, figures)
    write_text(place, page)
    return written


def check_report_path(path: str | Path) -> Destination:
    """Return the checked path of a report. Raises ArgumentError if it is not writable."""
    return check_destination(path, "ddiff report --out", suffix=".html", owned=_is_report)


def write_figures(
    runs: Sequence[ReportedRun], charts: Sequence[Chart | BarChart], folder: str | Path
) -> list[Path]:
    """Write the charts to a folder as SVG and PNG files, and return their paths."""
    argument = "ddiff report --figures"
    if check_destination(folder, argument, folder=True).local is None:
        raise ArgumentError(f"{argument} must be a local folder; got {folder}.")
    legend = [(run.name, run.number) for run in runs]
    paths = []
    for chart in charts:
        drawing = draw_file(chart.draw(), legend, chart.note)
        for suffix, owned in ((".svg", _is_chart), (".png", is_chart_image)):
            path = Path(folder) / f"{chart.name}{suffix}"
            place = check_destination(path, argument, suffix=suffix, owned=owned)
            content = drawing.encode() if suffix == ".svg" else draw_png(drawing)
            write_file(place, partial(_write_content, content))
            paths.append(path)
    return paths


def _write_content(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _is_report(file: IO[bytes]) -> bool:
    """Return whether `ddiff report` wrote an open file."""
    return f'content="{GENERATOR}"'.encode() in file.read(1000)


def _is_chart(file: IO[bytes]) -> bool:
    return file.read(60).startswith(b'<svg class="chart"')


# ---------------------------------------------------------------------- page


def make_page(
    runs: Sequence[ReportedRun],
    charts: Sequence[Chart | BarChart],
    extras: Extras | None = None,
) -> str:
    """Return the HTML text of the report."""
    extras = extras or Extras()
    trees = [(run, tree) for run in runs if (tree := read_tree(run)) is not None]
    confusions = [(run, tree, extras.confusions.get(run.number, ())) for run, tree in trees]
    explained = [(run_label(run), extras.explanations.get(run.number, ())) for run in runs]
    sections = {
        "summary": ("Summary", make_summary(runs)),
        "curves": ("Curves", _make_curves(runs, charts)),
        "evaluation": ("Evaluation", make_evaluation(runs)),
        "pareto": ("Quality, diversity and cost of samples", make_pareto(runs)),
        "trajectories": ("Sampling, step by step", _make_player(extras.trajectories)),
        "gaps": ("Gaps in held-out sentences", make_gaps(runs)),
        "samples": ("Samples", make_samples(runs)),
        "training-samples": ("Samples during training", make_training_samples(runs)),
        "pictures": ("Pictures", make_pictures(runs)),
        "confusions": ("What is confused with what", make_confusions(confusions)),
        "clusters": ("Clusters of tokens", make_clusters(confusions)),
        "formulas": ("Formulas", make_formulas(explained)),
        "environment": ("Environment", make_environment(runs)),
        "recipes": ("Recipes", make_recipes(runs)),
    }
    links = []
    parts = []
    for name, (title, content) in sections.items():
        if content:
            links.append(element("a", title, href=f"#{name}"))
            parts.append(section(name, title, content))
    title = "Report of " + ", ".join(run.name for run in runs)
    heading = element("h1", "Report of ", join(map(run_label, runs), ", "))
    body = [element("header", heading), element("nav", *links), element("main", *parts)]
    script = element("script", Markup(_read("page.js")))
    root = element("html", _make_head(title), element("body", *body, script), lang="en")
    return f"<!doctype html>\n{root}\n"


def _make_head(title: str) -> Markup:
    return element(
        "head",
        void_element("meta", charset="utf-8"),
        void_element("meta", name="generator", content=GENERATOR),
        void_element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void_element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        # an empty image, because a browser would request /favicon.ico
        void_element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(_make_style())),
    )


def _make_style() -> str:
    """Return the style of the page, with the colours of the runs for light and dark."""
    dots = "".join(f".dot.c{n}{{background:var(--c{n})}}" for n in range(NUM_COLORS))
    light = f":root{{{color_variables(LIGHT)}}}"
    dark = f"@media(prefers-color-scheme:dark){{:root{{{color_variables(DARK)}}}}}"
    return f"{light}{dark}{dots}{STYLE}{_read('page.css')}"


def _read(name: str) -> str:
    return files("ddiff.runs.report").joinpath(name).read_text(encoding="utf-8")


def _make_curves(runs: Sequence[ReportedRun], charts: Sequence[Chart | BarChart]) -> Markup:
    if not charts:
        return EMPTY
    legend = element("p", join(map(run_label, runs), "  "), _class="legend")
    drawn = []
    for chart in charts:
        note = element("figcaption", chart.note) if chart.note else EMPTY
        drawn.append(element("figure", chart.draw(), note))
    return join([legend, element("div", *drawn, _class="charts")])


def _make_player(trajectories: Sequence[AnyTrajectory]) -> Markup:
    """Return the data of the player, which page.js shows."""
    if not trajectories:
        return EMPTY
    content = [asdict(trajectory) for trajectory in trajectories]
    note = element("p", PLAYER_NOTE, _class="note")
    needs_script = element("noscript", "The player needs JavaScript.")
    return join(
        [note, element("div", needs_script, id="player"), json_script("trajectory-data", content)]
    )
