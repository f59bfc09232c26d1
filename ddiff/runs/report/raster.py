"""Draw chart files as PNG images with Pillow, which needs neither a browser nor a network.

Only the SVG elements of `ddiff.runs.report.charts` are drawn: lines, rectangles, circles, texts,
and paths of straight segments. The image has the colours of the light style.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import IO, NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ddiff.runs.report.charts import LIGHT

SOFTWARE = "ddiff report"  # mark of the files, which may be overwritten
SCALE = 3  # pixels of the image per unit of the chart
SMOOTHING = 2  # drawn this many times larger, then reduced, for smooth edges
FACTOR = SCALE * SMOOTHING
MARGIN = 6  # units around the chart
PAPER = "#ffffff"
NAMED = {"text": "#1b1f24", "muted": "#57606a", "line": "#d8dee4"}
TEXT_SIZE = 11
TITLE_SIZE = 13
DASH = (5.0, 4.0)  # units drawn and left out

Point = tuple[float, float]
Color = tuple[int, int, int]


class Stroke(NamedTuple):
    """Width in units and opacity of a path by its class in the style of charts."""

    width: float
    opacity: float


STROKES = {
    "line": Stroke(2.0, 1.0),
    "points": Stroke(2.0, 1.0),
    "faint": Stroke(1.0, 0.35),
    "dashed": Stroke(1.5, 1.0),
}
BAND_OPACITY = 0.18


def draw_png(svg: str) -> bytes:
    """Return the PNG image of a chart file, which `draw_file` wrote."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    size = (round((width + 2 * MARGIN) * FACTOR), round((height + 2 * MARGIN) * FACTOR))
    image = Image.new("RGB", size, PAPER)
    painter = Painter(image)
    for element in root:
        painter.draw(element)
    reduced = image.resize((size[0] // SMOOTHING, size[1] // SMOOTHING), Image.Resampling.LANCZOS)
    # few colours, so that the file is small
    content = io.BytesIO()
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    reduced.quantize(128).save(content, "PNG", optimize=True, pnginfo=mark)
    return content.getvalue()


def is_chart_image(file: IO[bytes]) -> bool:
    """Return whether an open file is an image that `draw_png` made."""
    head = file.read(1000)
    return head.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in head


class Painter:
    """Draws SVG elements of charts on an image."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)

    def draw(self, element: ElementTree.Element) -> None:
        """Draw one element. Elements of other kinds, such as styles, are skipped."""
        kind = element.tag.rpartition("}")[2]
        given = element.attrib
        if kind == "line":
            color = NAMED["text"] if given.get("class") == "whisker" else NAMED["line"]
            width = 1.5 if given.get("class") == "whisker" else 1.0
            ends = [(float(given["x1"]), float(given["y1"]))]
            ends.append((float(given["x2"]), float(given["y2"])))
            self._draw_segments(ends, _parse_color(color), width)
        elif kind == "rect":
            x, y, width, height = (float(given[name]) for name in ("x", "y", "width", "height"))
            box = [_place((x, y)), _place((x + width, y + height))]
            if width > 0:
                self.pen.rounded_rectangle(box, 2 * FACTOR, fill=_read_color(given))
        elif kind == "circle":
            center = (float(given["cx"]), float(given["cy"]))
            self._draw_disc(center, float(given["r"]), _read_color(given))
        elif kind == "path":
            self._draw_path(given)
        elif kind == "text":
            self._draw_text(element)

    def _draw_path(self, given: dict[str, str]) -> None:
        points = []
        for pair in re.findall(r"[ML]([^MLZ]+)", given["d"]):
            x, y = pair.split(",")
            points.append((float(x), float(y)))
        color = _read_color(given)
        kind = given.get("class", "line")
        if kind == "band":
            self._fill(points, color, BAND_OPACITY)
            return
        stroke = STROKES[kind]
        shown = _blend(color, stroke.opacity)
        pieces = _cut_dashes(points) if kind == "dashed" else [points]
        for piece in pieces:
            self._draw_segments(piece, shown, stroke.width)

    def _draw_segments(self, points: Sequence[Point], color: Color, width: float) -> None:
        places = [_place(point) for point in points]
        self.pen.line(places, fill=color, width=round(width * FACTOR), joint="curve")

    def _draw_disc(self, center: Point, radius: float, color: Color) -> None:
        x, y = center
        box = [_place((x - radius, y - radius)), _place((x + radius, y + radius))]
        self.pen.ellipse(box, fill=color)

    def _fill(self, points: Sequence[Point], color: Color, opacity: float) -> None:
        """Fill an area, through which what is drawn already stays visible."""
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon([_place(point) for point in points], fill=round(255 * opacity))
        self.image.paste(color, (0, 0, *self.image.size), mask)

    def _draw_text(self, element: ElementTree.Element) -> None:
        is_title = element.attrib.get("class") == "title"
        size = TITLE_SIZE if is_title else TEXT_SIZE
        color = _parse_color(NAMED["text" if is_title else "muted"])
        font = ImageFont.load_default(size * FACTOR)
        start = (float(element.attrib["x"]), float(element.attrib["y"]))
        x, y = _place(start)
        if len(element):
            self._draw_legend(element, start)
            return
        anchor = {"end": "rs", "middle": "ms"}.get(element.attrib.get("text-anchor", ""), "ls")
        self.pen.text((x, y), element.text or "", color, font, anchor, stroke_width=int(is_title))

    def _draw_legend(self, element: ElementTree.Element, start: Point) -> None:
        """Draw the names of the runs; a span with a colour is drawn as a disc."""
        font = ImageFont.load_default(TEXT_SIZE * FACTOR)
        x, y = start
        for span in element:
            if "style" in span.attrib:
                self._draw_disc((x + 3.5, y - 3.8), 3.5, _read_color(span.attrib))
                x += 10
                continue
            name = (span.text or "").rstrip()
            self.pen.text(_place((x, y)), name, _parse_color(NAMED["muted"]), font, "ls")
            x += font.getlength(name) / FACTOR + 12


def _place(point: Point) -> Point:
    return ((point[0] + MARGIN) * FACTOR, (point[1] + MARGIN) * FACTOR)


def _parse_color(text: str) -> Color:
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue


def _read_color(given: dict[str, str]) -> Color:
    """Return the colour of a style such as "fill:var(--c2)"."""
    found = re.search(r"var\(--c(\d+)\)", given.get("style", ""))
    return _parse_color(LIGHT[int(found[1])] if found else NAMED["text"])


def _blend(color: Color, opacity: float) -> Color:
    """Return a colour on white paper."""
    red, green, blue = (round(255 + opacity * (part - 255)) for part in color)
    return red, green, blue


def _cut_dashes(points: Sequence[Point]) -> list[list[Point]]:
    """Return the dashes of a horizontal line."""
    (start, y), (stop, _) = points[0], points[-1]
    dashes = []
    x = start
    while x < stop:
        dashes.append([(x, y), (min(x + DASH[0], stop), y)])
        x += sum(DASH)
    return dashes
