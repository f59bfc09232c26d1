"""Line charts and bar charts as SVG.

A chart is drawn in 440 x 260 units, so that its text is readable at the width of a phone. Colours
are CSS variables of the page. A chart file contains its own style for light and dark.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ddiff.runs.report.markup import Markup, element, join

WIDTH = 440
HEIGHT = 260
LEFT = 52  # margins in units of the drawing
RIGHT = 12
TOP = 30
BOTTOM = 38
NUM_COLORS = 8
MOST_POINTS = 300  # of a drawn line
NOTE_LETTERS = 76  # of a line of the note below a chart
NOTE_LINE = 15  # its height

LIGHT = ("#2a6fdb", "#d1495b", "#1b998b", "#b8860b", "#7b4bc4", "#4d7c0f", "#c2559d", "#57606a")
DARK = ("#6ea8fe", "#ff7b8a", "#4fd1b5", "#e6b450", "#b794f4", "#a3c76d", "#f19fd4", "#a8b3bf")

STYLE = """
.chart text{font:11px system-ui,sans-serif;fill:var(--muted)}
.chart .title{font-size:13px;font-weight:600;fill:var(--text)}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart path{fill:none;stroke-width:2;stroke-linejoin:round}
.chart .faint{stroke-width:1;opacity:.35}
.chart .dashed{stroke-dasharray:5 4;stroke-width:1.5}
.chart .band{stroke:none;opacity:.18}
.chart .whisker{stroke:var(--text);stroke-width:1.5}
"""

Kind = Literal["line", "faint", "dashed", "points"]


def color_variables(colors: Sequence[str]) -> str:
    """Return the CSS variables --c0, --c1, ... of the given colours."""
    return "".join(f"--c{number}:{color};" for number, color in enumerate(colors))


@dataclass(frozen=True)
class Line:
    """Line of a chart.

    Attributes:
        points: pairs (x, y) with increasing x.
        color: number of the colour.
        kind: "line", "faint" for the unsmoothed values, "dashed" for a horizontal reference line,
            whose label is drawn at its right end, or "points" for a line with its points.
        label: text at the right end of a dashed line, and text that a pointer shows.
    """

    points: Sequence[tuple[float, float]]
    color: int
    kind: Kind = "line"
    label: str = ""


@dataclass(frozen=True)
class Band:
    """Coloured area between two curves: triples (x, low, high) with increasing x.

    `label` is the text that a pointer shows.
    """

    points: Sequence[tuple[float, float, float]]
    color: int
    label: str = ""


@dataclass(frozen=True)
class Bar:
    """Bar of a chart: name, value, and number of its colour.

    `interval` is the confidence interval, drawn as a line, or None.
    """

    name: str
    value: float
    color: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """Chart with lines. `x_title` names the horizontal axis.

    `is_log` draws the vertical axis as a logarithm. `name` is the name of its file without ending.
    `bands` are areas behind the lines, and `note` is a text below the chart.
    """

    name: str
    title: str
    x_title: str
    lines: Sequence[Line]
    is_log: bool = False
    bands: Sequence[Band] = ()
    note: str = ""

    def draw(self) -> Markup:
        """Return the chart as an SVG element."""
        kept = [line for line in map(self._keep_drawable, self.lines) if line.points]
        xs = [x for line in kept for x, _ in line.points]
        ys = [self._scale(y) for line in kept if line.kind != "faint" for _, y in line.points]
        for band in self.bands:
            xs += [x for x, _, _ in band.points]
            ys += [self._scale(side) for _, *sides in band.points for side in sides]
        horizontal = Axis.around(xs or [0.0, 1.0], LEFT, WIDTH - RIGHT, margin=0.0)
        vertical = Axis.around(ys or [0.0, 1.0], HEIGHT - BOTTOM, TOP, margin=0.06)
        parts = [_draw_title(self.title), *self._draw_grid(horizontal, vertical)]
        for band in self.bands:
            parts.append(self._draw_band(band, horizontal, vertical))
        for line in sorted(kept, key=lambda line: line.kind != "faint"):
            parts.append(self._draw_line(line, horizontal, vertical))
        return _draw_frame(self.title, parts)

    def _scale(self, y: float) -> float:
        return math.log10(y) if self.is_log else y

    def _keep_drawable(self, line: Line) -> Line:
        """Return the line without points that cannot be drawn."""
        points = []
        for x, y in line.points:
            if math.isfinite(y) and (y > 0 or not self.is_log):
                points.append((x, y))
        return Line(points, line.color, line.kind, line.label)

    def _draw_grid(self, horizontal: Axis, vertical: Axis) -> list[Markup]:
        parts = []
        ticks = vertical.log_ticks() if self.is_log else vertical.ticks(5)
        for tick in ticks:
            y = _round(vertical.place(tick))
            value = 10.0**tick if self.is_log else tick
            parts.append(element("line", _class="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            label = format_number(value)
            parts.append(element("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"))
        bottom = HEIGHT - BOTTOM + 15
        for tick in horizontal.ticks(5):
            x = _round(horizontal.place(tick))
            parts.append(element("text", format_number(tick), x=x, y=bottom, text_anchor="middle"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(element("text", self.x_title, x=middle, y=HEIGHT - 8, text_anchor="middle"))
        return parts

    def _draw_band(self, band: Band, horizontal: Axis, vertical: Axis) -> Markup:
        upper = []
        lower = []
        for x, low, high in band.points:
            place = _round(horizontal.place(x))
            upper.append(f"{place},{_round(vertical.place(self._scale(high)))}")
            lower.append(f"{place},{_round(vertical.place(self._scale(low)))}")
        outline = "M" + "L".join([*upper, *reversed(lower)]) + "Z"
        name = element("title", band.label) if band.label else ""
        style = f"fill:var(--c{band.color % NUM_COLORS})"
        return element("path", name, _class="band", style=style, d=outline)

    def _draw_line(self, line: Line, horizontal: Axis, vertical: Axis) -> Markup:
        places = []
        for x, y in line.points:
            # faint lines may leave the drawing area, which follows the smoothed lines
            height = min(max(vertical.place(self._scale(y)), TOP), HEIGHT - BOTTOM)
            places.append((_round(horizontal.place(x)), _round(height)))
        stroke = f"stroke:var(--c{line.color % NUM_COLORS})"
        path = "M" + "L".join(f"{x},{y}" for x, y in places)
        name = element("title", line.label) if line.label else ""
        parts = [element("path", name, _class=line.kind, style=stroke, d=path)]
        # a path of a single point is invisible
        if line.kind == "points" or len(places) == 1:
            fill = f"fill:var(--c{line.color % NUM_COLORS})"
            parts += [element("circle", cx=x, cy=y, r=3, style=fill) for x, y in places]
        if line.kind == "dashed":
            x, y = places[-1]
            parts.append(element("text", line.label, x=x, y=y - 4, text_anchor="end"))
        return join(parts)


@dataclass(frozen=True)
class BarChart:
    """Chart with groups of horizontal bars.

    `groups` has pairs (title, bars). `unit` names the values. `note` is a text below the chart.
    """

    name: str
    title: str
    unit: str
    groups: Sequence[tuple[str, Sequence[Bar]]]
    note: str = ""

    def draw(self) -> Markup:
        """Return the chart as an SVG element."""
        bars = [bar for _, group in self.groups for bar in group]
        ends = [bar.value for bar in bars] + [bar.interval[1] for bar in bars if bar.interval]
        largest = max([end for end in ends if math.isfinite(end)], default=0.0)
        left = 96
        scale = (WIDTH - left - 56) / largest if largest > 0 else 0.0
        parts = [_draw_title(self.title)]
        y = TOP + 4
        for title, group in self.groups:
            middle = y + 8 * len(group) + 4
            label = shorten_label(title, 14)
            parts.append(element("text", label, x=left - 6, y=middle, text_anchor="end"))
            for bar in group:
                parts.append(_draw_bar(bar, left, y, scale))
                y += 16
            y += 10
        parts.append(element("text", self.unit, x=left, y=y + 6))
        return _draw_frame(self.title, parts, y + 14)


def _draw_bar(bar: Bar, left: float, y: float, scale: float) -> Markup:
    length = max(0.0, bar.value * scale) if math.isfinite(bar.value) else 0.0
    end = left + length
    style = f"fill:var(--c{bar.color % NUM_COLORS})"
    hint = element("title", f"{bar.name}: {bar.value:.4f}")
    parts = [
        element("rect", hint, x=left, y=y, width=_round(length), height=12, rx=2, style=style),
    ]
    if bar.interval is not None:
        low, high = (_round(left + max(0.0, side) * scale) for side in bar.interval)
        end = max(end, high)
        parts.append(element("line", _class="whisker", x1=low, x2=high, y1=y + 6, y2=y + 6))
    parts.append(element("text", format_number(bar.value), x=_round(end + 5), y=y + 10))
    return join(parts)


@dataclass(frozen=True)
class Axis:
    """Linear map of the values [low, high] to the places [start, stop] of the drawing."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, stop: float, margin: float) -> Axis:
        """Return the axis that shows all values.

        `margin` is the fraction of the range that is added at both ends.
        """
        low = min(values)
        high = max(values)
        if high - low < 1e-12 * max(1.0, abs(high)):
            # a single value is shown in the middle
            half = 0.5 * max(abs(high), 1.0)
            return cls(low - half, high + half, start, stop)
        extra = margin * (high - low)
        return cls(low - extra, high + extra, start, stop)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` values at multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def log_ticks(self) -> list[float]:
        """Return the logarithms of 1, 2 and 5 times the powers of ten, of ten only if many fit."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1, 2, 5) if len(powers) <= 4 else (1,)
        values = [power + math.log10(factor) for power in powers for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def _draw_title(title: str) -> Markup:
    return element("text", title, _class="title", x=4, y=16)


def _draw_frame(title: str, parts: Sequence[Markup], height: float = HEIGHT) -> Markup:
    view = f"0 0 {WIDTH} {_round(height)}"
    namespace = "http://www.w3.org/2000/svg"  # a name, which is not loaded
    return element(
        "svg", *parts, _class="chart", viewBox=view, role="img", aria_label=title, xmlns=namespace
    )


def draw_file(drawing: Markup, legend: Sequence[tuple[str, int]], note: str = "") -> str:
    """Return a chart as the text of an SVG file with its style, a legend and a note.

    Args:
        drawing: the chart.
        legend: pairs (name, number of the colour).
        note: text below the chart.
    """
    light = f"svg{{--text:#1b1f24;--muted:#57606a;--line:#d8dee4;{color_variables(LIGHT)}}}"
    dark = f"svg{{--text:#e6edf3;--muted:#9aa5b1;--line:#343c46;{color_variables(DARK)}}}"
    style = f"{light}@media(prefers-color-scheme:dark){{{dark}}}{STYLE}"
    names = []
    x = LEFT + 4
    for name, color in legend:
        names.append(element("tspan", "● ", style=f"fill:var(--c{color % NUM_COLORS})"))
        names.append(element("tspan", f"{name}   "))
    key = element("text", *names, x=x, y=28) if names else Markup("")
    drawing, lines = _add_note(drawing, note)
    inner = join([element("style", Markup(style)), key, *lines])
    return drawing.replace("</svg>", f"{inner}</svg>") + "\n"


def _add_note(drawing: Markup, note: str) -> tuple[Markup, list[Markup]]:
    """Return a drawing that is high enough for a note, and the lines of the note."""
    if not note:
        return drawing, []
    view = re.compile(r'viewBox="0 0 \S+ (\S+)"')
    height = float(view.findall(drawing)[0])
    lines = []
    for number, text in enumerate(textwrap.wrap(note, NOTE_LETTERS)):
        lines.append(element("text", text, x=4, y=height + 12 + NOTE_LINE * number))
    higher = _round(height + NOTE_LINE * len(lines) + 6)
    return Markup(view.sub(f'viewBox="0 0 {WIDTH} {higher}"', drawing, count=1)), lines


def average_bins(
    points: Sequence[tuple[float, float]], count: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """Return at most `count` points, the means of consecutive points."""
    size = max(1, -(-len(points) // count))
    means = []
    for start in range(0, len(points), size):
        chosen = points[start : start + size]
        x = sum(x for x, _ in chosen) / len(chosen)
        y = sum(y for _, y in chosen) / len(chosen)
        means.append((x, y))
    return means


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the moving mean of the values over up to `window` points around each point."""
    totals = [0.0]
    for _, y in points:
        totals.append(totals[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(points):
        # the window shrinks at both ends, and stays symmetric
        half = min(window // 2, index, len(points) - 1 - index)
        first = index - half
        last = index + half + 1
        smoothed.append((x, (totals[last] - totals[first]) / (last - first)))
    return smoothed


def format_number(value: float) -> str:
    """Format a number with at most four digits, such as 12.5, 3.2k or 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            divisor = 1e3 if letter == "k" else size
            return f"{value / divisor:.4g}{letter}"
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.4g}"


def shorten_label(text: str, length: int) -> str:
    """Return a text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _round(value: float) -> float:
    return round(value, 1)
