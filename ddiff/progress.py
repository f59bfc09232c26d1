"""How far a long job has come: a live bar on a terminal, plain lines elsewhere. On stderr: stdout is for results."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINE_EVERY_SECONDS = 10.0  # at first: a log of days should have hundreds of lines, not ten thousand
LINE_EVERY_SECONDS_AT_MOST = 300.0
LINE_EVERY_SHARE = 0.05  # of a job that is done soon, and of the time that has passed


class Progress(Protocol):
    """A job under way."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """`n` more are done; `figures` are shown from now on (`tokens_per_second=5300.0` as "tokens/s 5.3k")."""
        ...

    def note(self, text: str) -> None:
        """Print a line of its own, now."""
        ...


@contextmanager
def progress(
    total: int | None, title: str, *, start: int = 0, console: Console | None = None
) -> Iterator[Progress]:
    """Show a job of `total` items (None: unknown) of which `start` were done before."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = ProgressLines(total, title, start, console)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bar:
        yield ProgressBar(bar, bar.add_task(title, total=total, completed=start, figures=""))


def print_line(line: str, console: Console | None = None) -> None:
    """Print a line as it is on stderr, above a live bar if there is one."""
    (console or Console(stderr=True)).print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def under_way(title: str, *, console: Console | None = None) -> Iterator[None]:
    """Show that a job of unknown size goes on: a spinner on a terminal, elsewhere a line every ten seconds."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with console.status(title):
            yield
        return
    ended = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not ended.wait(LINE_EVERY_SECONDS):
            print_line(f"{title}: {_clock(time.monotonic() - began)} elapsed", console)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


@final
class ProgressBar:
    """A live bar."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._figures: dict[str, float] = {}

    def advance(self, n: int = 1, **figures: float) -> None:
        self._figures |= figures
        self._bar.update(self._task, advance=n, figures=_spelled(self._figures))

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


@final
class ProgressLines:
    """A line every ten seconds, later every twentieth of the time that has passed, up to five minutes.

    A job that is soon done has a line for each twentieth of it, and none has more than one a second. What counts is the
    clock, never the number of calls of `advance`.
    """

    def __init__(self, total: int | None, title: str, start: int, console: Console) -> None:
        self._total, self._title, self._console = total, title, console
        self._start = self._done = self._printed = start
        self._began = self._last = time.monotonic()
        self._figures: dict[str, float] = {}

    def advance(self, n: int = 1, **figures: float) -> None:
        self._done += n
        self._figures |= figures
        now = time.monotonic()
        waited, passed = now - self._last, now - self._began
        interval = min(
            max(LINE_EVERY_SECONDS, LINE_EVERY_SHARE * passed), LINE_EVERY_SECONDS_AT_MOST
        )
        share = (self._done - self._printed) / self._total if self._total else 0.0
        if waited >= interval or (waited >= 1.0 and share >= LINE_EVERY_SHARE):
            self._print()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Print where the job ended, unless that line stands already."""
        if self._printed != self._done:
            self._print()

    def _print(self) -> None:
        self._printed, self._last = self._done, time.monotonic()
        seconds = self._last - self._began
        parts = [
            f"{self._title}: {self._done}",
            _spelled(self._figures),
            f"{_clock(seconds)} elapsed",
        ]
        if self._total:
            parts[0] += f"/{self._total} ({self._done / self._total:.0%})"
            left = seconds / max(1, self._done - self._start) * (self._total - self._done)
            parts.append(f"ETA {_clock(left)}")
        self._console.print(
            "  ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True
        )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _spelled(figures: dict[str, float]) -> str:
    names = (name.replace("_per_second", "/s").replace("_", " ") for name in figures)
    return "  ".join(f"{name} {_short(value)}" for name, value in zip(names, figures.values()))


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
