"""Charts of sweeps: fronts of perplexity and entropy, and perplexity against network evaluations.

The first panel shows every point: its colour is the run, its size the number of network evaluations
per sample (NFE), and a filled circle is a point that no other point dominates. A line per run joins
the points that no other point of the run dominates in perplexity and entropy. The second panel
compares perplexities at one entropy, because a perplexity has no meaning without the entropy of
the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ddiff.evaluation.pareto import Curve, Tradeoff, choose_entropy, find_front, trace_front
from ddiff.run_dir.files import PARETO
from ddiff.run_dir.pareto_record import HeldOutText, ParetoRecord, SweepPoint, read_pareto
from ddiff.runs.report.charts import (
    BOTTOM,
    DARK,
    HEIGHT,
    LEFT,
    LIGHT,
    NUM_COLORS,
    RIGHT,
    STYLE,
    TOP,
    WIDTH,
    Axis,
    color_variables,
    format_number,
)
from ddiff.runs.report.markup import EMPTY, Markup, element, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import make_table, run_label

MOST_ROWS = 40  # of the table of a run
SMALLEST = 2.5  # radius of the circle of the fewest network evaluations
LARGEST = 8.0
MARKER = 6.0  # half the width of the mark of held-out text
GENERATOR = "ddiff pareto"

FRONT_NOTE = (
    "Lower perplexity and higher entropy are better. Larger circles need more network evaluations "
    "per sample (NFE). A filled circle is a point that no other point dominates: none has a "
    "perplexity as low, an entropy as high and an NFE as low, and is better in one of them. A "
    "line joins the points of a run that are best in perplexity and entropy at any cost. Entropy "
    "above that of the held-out text (diamond) is not an advantage."
)
COST_NOTE = (
    "Perplexities can only be compared at the same entropy. Each point interpolates the points of "
    "one sampler with one number of steps, over its temperatures, at that entropy."
)
PARETO_STYLE = """
.chart .dot{stroke-width:1.5}
.chart .hollow{fill:none;opacity:.65}
.chart .level{stroke:var(--text)}
.chart .held-out{fill:var(--text);stroke:none}
.chart .halo{stroke:var(--card,none);stroke-width:3;paint-order:stroke}
"""


@dataclass(frozen=True)
class ColoredRecord:
    """Points of a run with the number of its colour."""

    record: ParetoRecord
    color: int
    name: str

    @property
    def points(self) -> Sequence[SweepPoint]:
        return self.record.points


def to_tradeoff(point: SweepPoint) -> Tradeoff:
    """Return perplexity, entropy and NFE of a point."""
    return Tradeoff(point.perplexity.value, point.entropy.value, point.nfe)


# ---------------------------------------------------------------------- axes


@dataclass(frozen=True)
class LogAxis:
    """Axis of the logarithm of positive values."""

    axis: Axis

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, stop: float, margin: float = 0.08
    ) -> LogAxis:
        """Return the axis that shows all values.

        `margin` is the fraction of the range that is added at both ends.
        """
        logs = [math.log10(value) for value in values]
        if max(logs) - min(logs) < 0.02:
            middle = (max(logs) + min(logs)) / 2
            logs = [middle - 0.1, middle + 0.1]
        return cls(Axis.around(logs, start, stop, margin))

    def place(self, value: float) -> float:
        return self.axis.place(math.log10(value))

    def ticks(self) -> list[float]:
        """Return 1, 2 and 5 times powers of ten, or round numbers if these are too few."""
        found = [10.0**tick for tick in self.axis.log_ticks()]
        if len(found) >= 3:
            return found
        linear = Axis(10.0**self.axis.low, 10.0**self.axis.high, 0.0, 1.0)
        return [tick for tick in linear.ticks(4) if tick > 0.0]


@dataclass(frozen=True)
class Frame:
    """Drawing area of a panel with both axes and their grid."""

    title: str
    x_title: str
    horizontal: Axis | LogAxis
    x_ticks: Sequence[float]
    vertical: LogAxis

    def place(self, x: float, y: float) -> tuple[float, float]:
        return round(self.horizontal.place(x), 1), round(self.vertical.place(y), 1)

    def draw(self, parts: Sequence[Markup]) -> Markup:
        """Return the panel with `parts` inside the axes as an SVG element."""
        grid = [element("text", self.title, _class="title", x=4, y=16)]
        for tick in self.vertical.ticks():
            y = round(self.vertical.place(tick), 1)
            grid.append(element("line", _class="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            label = format_number(tick)
            grid.append(element("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"))
        bottom = HEIGHT - BOTTOM + 15
        for tick in self.x_ticks:
            x = round(self.horizontal.place(tick), 1)
            grid.append(element("text", format_number(tick), x=x, y=bottom, text_anchor="middle"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        grid.append(element("text", self.x_title, x=middle, y=HEIGHT - 8, text_anchor="middle"))
        return element(
            "svg",
            *grid,
            *parts,
            _class="chart",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=self.title,
            xmlns="http://www.w3.org/2000/svg",  # a name, which is not loaded
        )


# ---------------------------------------------------------------------- fronts


def draw_fronts(records: Sequence[ColoredRecord]) -> Markup:
    """Return the panel with entropy, perplexity and NFE of all points."""
    references = collect_references(records)
    points = [to_tradeoff(point) for record in records for point in record.points]
    perplexities = [point.perplexity for point in points]
    perplexities += [held_out.perplexity.value for held_out in references]
    entropies = [point.entropy for point in points]
    entropies += [held_out.entropy.value for held_out in references]
    horizontal = Axis.around(entropies, LEFT + LARGEST, WIDTH - RIGHT - LARGEST, margin=0.04)
    frame = Frame(
        title="Perplexity under the judge (logarithmic)",
        x_title="entropy per sample, nats",
        horizontal=horizontal,
        x_ticks=horizontal.ticks(5),
        vertical=LogAxis.around(perplexities, HEIGHT - BOTTOM, TOP),
    )
    sizes = [point.nfe for point in points]
    marks = iter(find_front(points))
    lines = [_draw_front_line(record, frame) for record in records]
    dots = []
    for record in records:
        for point in record.points:
            dots.append(_draw_point(record, point, frame, sizes, next(marks)))
    # large circles first, so that they do not cover small ones
    dots.sort(key=lambda dot: -dot[0])
    diamonds = [_draw_reference(held_out, frame) for held_out in references]
    return frame.draw([*lines, *[markup for _, markup in dots], *diamonds])


def collect_references(records: Sequence[ColoredRecord]) -> list[HeldOutText]:
    """Return the figures of held-out text, without repetitions."""
    found: list[HeldOutText] = []
    for record in records:
        if record.record.held_out not in found:
            found.append(record.record.held_out)
    return found


def _draw_front_line(record: ColoredRecord, frame: Frame) -> Markup:
    front = trace_front([to_tradeoff(point) for point in record.points])
    if len(front) < 2:
        return EMPTY
    places = [frame.place(point.entropy, point.perplexity) for point in front]
    path = "M" + "L".join(f"{x},{y}" for x, y in places)
    hint = element("title", f"front of {record.name}")
    return element("path", hint, d=path, style=f"stroke:var(--c{record.color % NUM_COLORS})")


def _draw_point(
    record: ColoredRecord,
    point: SweepPoint,
    frame: Frame,
    sizes: Sequence[float],
    is_best: bool,
) -> tuple[float, Markup]:
    """Return the radius of a point and its circle.

    `sizes` are the NFE of all points. `is_best`: no other point dominates the point.
    """
    x, y = frame.place(point.entropy.value, point.perplexity.value)
    radius = scale_radius(point.nfe, sizes)
    color = f"var(--c{record.color % NUM_COLORS})"
    style = f"stroke:{color};fill:{color}" if is_best else f"stroke:{color}"
    circle = element(
        "circle",
        element("title", describe_point(record.name, point)),
        cx=x,
        cy=y,
        r=round(radius, 1),
        _class="dot" if is_best else "dot hollow",
        style=style,
    )
    return radius, circle


def scale_radius(nfe: float, sizes: Sequence[float]) -> float:
    """Return the radius of a circle, which rises with the logarithm of the NFE."""
    low = math.log(min(sizes))
    high = math.log(max(sizes))
    if high - low < 1e-9:
        return (SMALLEST + LARGEST) / 2
    return SMALLEST + (LARGEST - SMALLEST) * (math.log(nfe) - low) / (high - low)


def _draw_reference(held_out: HeldOutText, frame: Frame) -> Markup:
    """Return the diamond of held-out text with its label."""
    x, y = frame.place(held_out.entropy.value, held_out.perplexity.value)
    corners = [(x, y - MARKER), (x + MARKER, y), (x, y + MARKER), (x - MARKER, y)]
    path = "M" + "L".join(f"{left:.1f},{top:.1f}" for left, top in corners) + "Z"
    text = (
        f"held-out text: perplexity {held_out.perplexity.value:.4g} at entropy "
        f"{held_out.entropy.value:.3f}"
    )
    diamond = element("path", element("title", text), d=path, _class="held-out")
    # the label is on the side with more space
    is_right = x > (LEFT + WIDTH - RIGHT) / 2
    label = element(
        "text",
        "held-out text",
        x=round(x - MARKER - 4 if is_right else x + MARKER + 4, 1),
        y=round(y + 4, 1),
        text_anchor="end" if is_right else "start",
        _class="halo",
    )
    return join([diamond, label])


def describe_point(name: str, point: SweepPoint) -> str:
    """Return the settings and the figures of a point as one line."""
    parts = [name, describe_setting(point)]
    parts.append(f"NFE {point.nfe:.4g}")
    parts.append(f"perplexity {point.perplexity.value:.4g} at entropy {point.entropy.value:.3f}")
    return ", ".join(parts)


def describe_setting(point: SweepPoint) -> str:
    """Return sampler, steps and temperature of a point."""
    parts = [point.kind]
    if point.steps is not None:
        parts.append(f"{point.steps} steps")
    if point.temperature is not None:
        parts.append(f"temperature {point.temperature:g}")
    return ", ".join(parts)


# ---------------------------------------------------------------------- cost


@dataclass(frozen=True)
class CostPoint:
    """Interpolated point of one sampler with one number of steps."""

    color: int
    name: str
    kind: str
    steps: int | None
    tradeoff: Tradeoff

    @property
    def group(self) -> str:
        """Name of the line that joins the points of one run and sampler."""
        return f"{self.name}, {self.kind}"


def compare_costs(records: Sequence[ColoredRecord]) -> tuple[float, list[CostPoint]]:
    """Return the entropy of the comparison, and the points at which samplers reach it.

    `choose_entropy` selects the entropy. Every sampler with a number of steps has one point, which
    is interpolated over its temperatures.
    """
    curves: dict[tuple[str, str, int | None], tuple[ColoredRecord, list[Tradeoff]]] = {}
    for record in records:
        for point in record.points:
            key = (record.name, point.kind, point.steps)
            curves.setdefault(key, (record, []))[1].append(to_tradeoff(point))
    references = collect_references(records)
    goal = sum(held_out.entropy.value for held_out in references) / len(references)
    entropy = choose_entropy([Curve(points) for _, points in curves.values()], goal)
    found = []
    for (name, kind, steps), (record, points) in curves.items():
        tradeoff = Curve(points).at(entropy)
        if tradeoff is not None:
            found.append(CostPoint(record.color, name, kind, steps, tradeoff))
    return entropy, found


def draw_costs(records: Sequence[ColoredRecord]) -> Markup:
    """Return the panel with NFE and perplexity at one entropy."""
    entropy, points = compare_costs(records)
    sizes = [point.tradeoff.nfe for point in points]
    horizontal = LogAxis.around(sizes, LEFT + LARGEST, WIDTH - RIGHT - LARGEST)
    # held-out text of another entropy cannot be compared
    levels = [
        held_out for held_out in collect_references(records) if held_out.entropy.value == entropy
    ]
    perplexities = [point.tradeoff.perplexity for point in points]
    perplexities += [held_out.perplexity.value for held_out in levels]
    frame = Frame(
        title=f"Perplexity at entropy {entropy:.2f} nats (logarithmic)",
        x_title="network evaluations per sample (logarithmic)",
        horizontal=horizontal,
        x_ticks=horizontal.ticks(),
        vertical=LogAxis.around(perplexities, HEIGHT - BOTTOM, TOP),
    )
    groups: dict[str, list[CostPoint]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    lines = []
    for name, group in groups.items():
        kinds = {point.kind for point in points if point.name == group[0].name}
        # the colour already names the run
        label = group[0].kind if len(kinds) > 1 else ""
        lines.append(_draw_cost_line(name, group, frame, label))
    return frame.draw([*[_draw_level(held_out, frame) for held_out in levels], *lines])


def _draw_level(held_out: HeldOutText, frame: Frame) -> Markup:
    """Return the dashed line of the perplexity of held-out text with its label."""
    y = round(frame.vertical.place(held_out.perplexity.value), 1)
    right = WIDTH - RIGHT
    line = element("path", d=f"M{LEFT},{y}L{right},{y}", _class="dashed level")
    text = element("text", "held-out text", x=right, y=y - 4, text_anchor="end", _class="halo")
    return join([line, text])


def _draw_cost_line(name: str, points: Sequence[CostPoint], frame: Frame, label: str) -> Markup:
    """Return the points of one run and sampler, a line through them, and a label at its end."""
    ordered = sorted(points, key=lambda point: point.tradeoff.nfe)
    color = f"var(--c{ordered[0].color % NUM_COLORS})"
    places = [frame.place(point.tradeoff.nfe, point.tradeoff.perplexity) for point in ordered]
    parts = []
    if len(places) > 1:
        path = "M" + "L".join(f"{x},{y}" for x, y in places)
        parts.append(element("path", element("title", name), d=path, style=f"stroke:{color}"))
    for point, (x, y) in zip(ordered, places):
        steps = "" if point.steps is None else f", {point.steps} steps"
        found = point.tradeoff
        text = f"{name}{steps}: NFE {found.nfe:.4g}, perplexity {found.perplexity:.4g}"
        text += f" at entropy {found.entropy:.3f}"
        hint = element("title", text)
        parts.append(element("circle", hint, cx=x, cy=y, r=3.5, style=f"fill:{color}"))
    if label:
        x, y = places[-1]
        anchor = "end" if x > (LEFT + WIDTH - RIGHT) / 2 else "start"
        text = element("text", label, x=x, y=round(y - 7, 1), text_anchor=anchor, _class="halo")
        parts.append(text)
    return join(parts)


# ---------------------------------------------------------------------- files


def draw_pareto_file(records: Sequence[ParetoRecord]) -> str:
    """Return both panels next to each other as the text of an SVG file."""
    colored = []
    for number, record in enumerate(records):
        colored.append(ColoredRecord(record, number, record.run))
    light = f"svg{{--text:#1b1f24;--muted:#57606a;--line:#d8dee4;{color_variables(LIGHT)}}}"
    dark = f"svg{{--text:#e6edf3;--muted:#9aa5b1;--line:#343c46;{color_variables(DARK)}}}"
    style = f"{light}@media(prefers-color-scheme:dark){{{dark}}}{STYLE}{PARETO_STYLE}"
    gap = 24
    panels = []
    for number, panel in enumerate((draw_fronts(colored), draw_costs(colored))):
        shift = f"translate({number * (WIDTH + gap)} 20)"
        # a nested svg element needs its own size
        sized = panel.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)
        panels.append(element("g", Markup(sized), transform=shift))
    view = f"0 0 {2 * WIDTH + gap} {HEIGHT + 20}"
    root = element(
        "svg",
        element("desc", GENERATOR),
        element("style", Markup(style)),
        _draw_legend(colored),
        *panels,
        _class="chart",
        viewBox=view,
        xmlns="http://www.w3.org/2000/svg",
    )
    return root + "\n"


def is_pareto_chart(start: bytes) -> bool:
    """Return whether a file with this start was written by `ddiff pareto`."""
    return start.startswith(b"<svg ") and f"<desc>{GENERATOR}</desc>".encode() in start


def _draw_legend(records: Sequence[ColoredRecord]) -> Markup:
    """Return the names of the runs with their colours, and the smallest and largest circle."""
    sizes = [point.nfe for record in records for point in record.points]
    parts: list[Markup] = []
    for record in records:
        color = f"fill:var(--c{record.color % NUM_COLORS})"
        parts.append(element("tspan", "●", style=color, dx=10 if parts else 0))
        parts.append(element("tspan", record.name, dx=4))
    text = f"circle size: NFE {min(sizes):.4g} to {max(sizes):.4g}; filled: not dominated"
    parts.append(element("tspan", text, dx=16))
    return element("text", *parts, x=4, y=14)


# ---------------------------------------------------------------------- report


def make_pareto(runs: Sequence[ReportedRun]) -> Markup:
    """Return the charts and tables of the sweeps of runs.

    Runs whose figures cannot be compared have separate charts.
    """
    parts = []
    for group in group_comparable(_read_records(runs)):
        by_name = {run.name: run for run in runs}
        labels = [run_label(by_name[record.name]) for record in group]
        parts.append(element("p", join(labels, "  "), _class="legend"))
        figures = []
        for drawing, note in ((draw_fronts(group), FRONT_NOTE), (draw_costs(group), COST_NOTE)):
            caption = element("figcaption", note)
            figures.append(element("figure", drawing, caption))
        parts.append(element("div", *figures, _class="charts"))
        parts.append(_make_table(group))
    if not parts:
        return EMPTY
    return join([element("style", Markup(PARETO_STYLE)), *parts])


def _read_records(runs: Sequence[ReportedRun]) -> Iterator[ColoredRecord]:
    for run in runs:
        record = read_pareto(run.directory / PARETO)
        if record is not None and record.points:
            yield ColoredRecord(record, run.number, run.name)


ENTROPY_KEYS = ("length", "unit", "tokenizer")
"""Settings that must be equal for the entropies of two runs to be comparable."""
COMPARED = ("count", *ENTROPY_KEYS, "retokenized")
"""Settings that must be equal for the entropies and perplexities of two runs to be comparable."""


def group_comparable(records: Iterator[ColoredRecord]) -> list[list[ColoredRecord]]:
    """Divide records into groups with the same judge and the same kind of samples."""
    groups: dict[str, list[ColoredRecord]] = {}
    for colored in records:
        protocol: Mapping[str, object] = colored.record.protocol
        judge = colored.record.protocol["judge"]
        # the fingerprint of the judge, or its name if there is none
        key = [judge.get("model", judge.get("judge")), *[protocol.get(name) for name in COMPARED]]
        groups.setdefault(repr(key), []).append(colored)
    return list(groups.values())


def _make_table(records: Sequence[ColoredRecord]) -> Markup:
    """Return the points that no other point dominates as a folded table, and the settings."""
    points = [(record, point) for record in records for point in record.points]
    marks = find_front([to_tradeoff(point) for _, point in points])
    best = [pair for pair, is_best in zip(points, marks) if is_best]
    best.sort(key=lambda pair: (pair[1].nfe, pair[1].perplexity.value))
    rows: list[list[object]] = []
    for record, point in best[:MOST_ROWS]:
        perplexity = f"{point.perplexity.value:.4g} at {point.entropy.value:.3f}"
        row = [record.name, describe_setting(point), f"{point.nfe:.4g}", perplexity]
        row.append("–" if point.distinct_2 is None else f"{point.distinct_2:.3f}")
        row.append("–" if point.known_words is None else f"{point.known_words.value:.3f}")
        rows.append([*row])
    heads = [
        "run",
        "setting",
        "NFE",
        "perplexity at entropy",
        "distinct-2",
        "share of words in held-out text",
    ]
    title = element("summary", f"{len(best)} of {len(points)} points are not dominated")
    protocol = records[0].record.protocol
    judge = protocol["judge"].get("judge", "")
    note = f"{protocol['count']} samples of {protocol['length']} {protocol['unit']}s per point, "
    note += f"judge {judge}. Perplexities of two judges cannot be compared."
    return join(
        [element("p", note, _class="note"), element("details", title, make_table(heads, rows))]
    )
