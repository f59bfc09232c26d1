"""Print learning curves of runs as a Markdown table, and draw them as an SVG image.

    python benchmarks/curves.py runs/side/{mdlm,hdlm}_small_seed0 --svg docs/learning_curves.svg

The curves show the diffusion term of the bound, with unclipped weights, in nats per token of the
training text, as recorded in `metrics.jsonl`. The other terms of the bound (KL to the prior at
t = 1, decoding at t = 0) are not included. A run on a tree of tokens also has a row for each level.
Each number is a mean over the training steps since the previous number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 50, 190, 20, 40
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#555555",
    "#8c564b",
    "#17a64a",
    "#b03060",
)


class Curve(NamedTuple):
    name: str
    steps: list[int]
    nats: list[float]


def curves(run_dir: Path, every: int) -> list[Curve]:
    """Read the curve of the bound of a run, followed by the curve of each tree level.

    Each point is the mean over `every` training steps.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    groups = [lines[first : first + every] for first in range(0, len(lines), every)]
    names = [name for name in lines[0] if name.startswith(("nelbo_", "nll_"))]
    shown = []
    for name in names:
        part = name.removeprefix("nelbo_").removesuffix("_nats_per_token")
        label = run_dir.name if part in ("diffusion", "nll") else f"{run_dir.name}: {part}"
        means = [sum(line[name] for line in group) / len(group) for group in groups]
        shown.append(Curve(label, [group[-1]["step"] for group in groups], means))
    return shown


def table(all_curves: Sequence[Curve]) -> str:
    longest = max((curve.steps for curve in all_curves), key=len)
    rows = [["run", *(f"{step}" for step in longest)], ["---"] * (len(longest) + 1)]
    rows += [[curve.name, *(f"{nats:.2f}" for nats in curve.nats)] for curve in all_curves]
    width = len(longest) + 1
    return "\n".join("| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows)


def draw_svg(bounds: Sequence[Curve]) -> str:
    """Return the text of an SVG image of the curves `bounds`, by training step."""
    low = min(min(curve.nats) for curve in bounds)
    # Exclude the first points, which are high after the random initialization.
    high = max(max(curve.nats[1:] or curve.nats) for curve in bounds)
    last = max(curve.steps[-1] for curve in bounds)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(nats: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(nats, high)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 6}">training steps</text>'
        '<text x="4" y="12">nats per token</text>',
    ]
    for count in range(5):
        nats, step = low + (high - low) * count / 4, last * count // 4
        parts.append(f'<path d="M{LEFT} {y(nats):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(nats) + 4:.1f}" text-anchor="end">{nats:.1f}</text>'
        )
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>'
        )
    for number, curve in enumerate(bounds):
        colour, row = COLOURS[number % len(COLOURS)], TOP + 12 + 18 * number
        points = " ".join(
            f"{x(step):.1f},{y(nats):.1f}" for step, nats in zip(curve.steps, curve.nats)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(
            f'<path d="M{WIDTH - RIGHT + 12} {row - 4}h18" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{row}">{escape(curve.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--every", type=int, default=50, help="training steps per point")
    parser.add_argument("--svg", type=Path, help="path of an SVG image of the curves")
    given = parser.parse_args()
    drawn = [curves(run_dir, given.every) for run_dir in given.runs]
    print(table([curve for run in drawn for curve in run]))
    if given.svg:
        given.svg.write_text(draw_svg([run[0] for run in drawn]))


if __name__ == "__main__":
    main()
